"""Measures where the time of a long run goes: steps, waiting, restarts; and its devices' memory."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_IN_STEPS = ("data", "device")
"""Waits during which devices may compute."""


class Clock:
  """The time of a run's steps, apart from all other time, measured without waiting for a device.

      with clock.waiting("data"):
        batch = next(batches)
      state, metrics = step(state, batch)
      clock.stepped()
      ...
      with clock.waiting("device"):
        values = jax.device_get(metrics)
      line = clock.report(number)

  A step is dispatched long before it is done, so the time between two dispatches is that of the
  host. What is left for the report to wait for is spread evenly over its steps: their times sum up
  to the wall clock's, and a step that was late, because its data was, can be seen.
  """

  def __init__(self, earlier: Mapping[str, Any] | None = None, *, began: float | None = None):
    """Starts to measure.

    Args:
      earlier: last valid line of the run that is resumed; None: it is new.
      began: `time.time()` at which this part of the run began; None: now.
    """
    began = time.time() if began is None else began
    self._first = began if earlier is None else earlier["time"] - earlier["wall"]
    self._in_steps = 0.0 if earlier is None else earlier["in_steps"]
    self._starts = 1 if earlier is None else earlier["starts"] + 1
    self._intervals: list[float] = []
    self._waits: dict[str, _Wait] = {}
    self._outside = 0.0
    self._last = time.perf_counter() - (time.time() - began)
    self._compiling = True

  def waiting(self, name: str) -> "_Wait":
    """Returns a context whose time is reported under this name.

    Waits for 'data' and 'device' are part of the steps; all others ('checkpoint', 'evaluation')
    are not.
    """
    if name not in self._waits:
      self._waits[name] = _Wait(self, name in _IN_STEPS)
    return self._waits[name]

  def stepped(self) -> None:
    """Records that a step was dispatched; the time before the first one is 'start'."""
    now = time.perf_counter()
    interval = now - self._last - self._outside
    if self._compiling:
      self.waiting("start").seconds += interval
      self._compiling = False
    else:
      self._intervals.append(interval)
    self._last, self._outside = now, 0.0

  def report(self, step: int) -> dict[str, Any]:
    """Returns what was measured since the last report; call it after the host has waited for the
    step.

    Returns:
      step: the argument.
      time: `time.time()`.
      wall: seconds since the run was first started, including those when it did not run.
      in_steps: of these, the seconds of steps. Steps that a restart did again count once.
      goodput: in_steps / wall.
      starts: number of times the run was started.
      step_ms: mean and the 50th, 90th and 99th percentile of the steps' times in ms; missing where
        there was no step but the first one.
      waited: seconds by the names given to `waiting`. Where that for 'data' is long and that for
        the 'device' short, devices were idle.
      memory: bytes of the fullest device of this host, 'in_use', at its 'peak', and in all
        ('limit'); missing where it does not report them.
    """
    line: dict[str, Any] = {"step": step, "time": time.time()}
    if times := self._times():
      statistics = 1e3 * np.array([np.mean(times), *np.percentile(times, (50, 90, 99))])
      line["step_ms"] = dict(zip(("mean", "p50", "p90", "p99"), statistics.tolist()))
      self._in_steps += sum(times)
    line["waited"] = {name: wait.seconds for name, wait in self._waits.items() if wait.seconds}
    for wait in self._waits.values():
      wait.seconds = 0.0
    if memory := device_memory():
      line["memory"] = memory
    wall = max(
      line["time"] - self._first, self._in_steps
    )  # the clock on the wall may have been put back
    goodput = self._in_steps / wall if wall else 0.0
    return line | {
      "wall": wall,
      "in_steps": self._in_steps,
      "goodput": goodput,
      "starts": self._starts,
    }

  def _times(self) -> list[float]:
    """Returns the seconds of each step since the last report."""
    if not self._intervals:
      return []
    now, count = time.perf_counter(), len(self._intervals)
    rest = (now - self._last - self._outside) / count
    times = [interval + rest for interval in self._intervals]
    self._intervals.clear()
    self._last, self._outside = now, 0.0
    return times


class _Wait:
  """A context that adds up the seconds spent in it."""

  __slots__ = ("_clock", "_entered", "_inside", "seconds")

  def __init__(self, clock: Clock, inside: bool):
    self._clock, self._inside, self.seconds, self._entered = clock, inside, 0.0, 0.0

  def __enter__(self):
    self._entered = time.perf_counter()

  def __exit__(self, *error):
    seconds = time.perf_counter() - self._entered
    self.seconds += seconds
    if not self._inside:
      self._clock._outside += seconds


def device_memory() -> dict[str, int]:
  """Bytes 'in_use', at the 'peak' and in all ('limit') of the device of this host that has most in
  use; or nothing.
  """
  device_stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  if not device_stats:
    return {}
  fullest = max(device_stats, key=lambda stats: stats.get("bytes_in_use", 0))
  names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
  return {name: int(fullest[key]) for name, key in names.items() if key in fullest}
