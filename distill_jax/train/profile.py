"""Traces some steps of a run, for xprof and TensorBoard's profile tab."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profile:
  """Traces some steps of a run into `folder/profile`; `xprof --logdir=folder/profile` shows it.

  Use it as a context manager, which saves a trace that an error cuts short.

      with Profile(folder, range(100, 110)) as profile:
        for number in ...:
          state, metrics = profile(number, step, state, teacher, batch)

  Each of several processes writes a file of its own there. A trace shows where time goes within a
  step; taking it costs time itself.
  """

  def __init__(self, folder: str | Path | None, steps: range | None):
    """Prepares the trace.

    Args:
      folder: of the run; None: nothing is traced.
      steps: consecutive numbers of the steps to trace; None: nothing is traced.
    """
    # Traces are named after the host, and several processes may share one.
    process = f"process-{jax.process_index()}" if jax.process_count() > 1 else ""
    self._folder = None if folder is None else Path(folder) / "profile" / process
    self._steps = range(0) if steps is None or folder is None else steps
    self._on = self._done = False

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if self._on:
      self._stop()
    elif self._steps and not self._done and kind is None:
      warnings.warn(
        f"no step of {self._steps} was traced: training did not come by there", stacklevel=2
      )

  def __call__(self, number: int, step: Callable[..., Any], *arguments: Any) -> Any:
    """`step(*arguments)`, traced if its number is among those to be traced."""
    if number not in self._steps:
      return step(*arguments)
    if not self._on:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      outputs = step(*arguments)
    if number == self._steps[-1]:
      jax.block_until_ready(outputs)  # or the devices' part of the trace would be missing
      self._stop()
    return outputs

  def _stop(self) -> None:
    self._on, self._done = False, True
    jax.profiler.stop_trace()


def parse_steps(text: str) -> range:
  """The steps of START:STOP: from START, counted from 1, to the one before STOP.

  Raises:
    ValueError: it is something else, or holds no step.

  >>> parse_steps("100:110")
  range(100, 110)
  """
  match = re.fullmatch(r"(\d+):(\d+)", text)
  steps = range(*map(int, match.groups())) if match else range(0)
  if not steps or steps[0] < 1:
    raise ValueError(f"expected START:STOP with 1 <= START < STOP, such as 100:110, got {text!r}")
  return steps
