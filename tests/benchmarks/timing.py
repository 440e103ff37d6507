"""Two ways to do the same work, timed by turns."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

Run = Callable[[int], Any]
"""Makes a number of steps and returns arrays that are ready when the last one is done."""


class Ratio(NamedTuple):
  """Seconds per step of both sides, sample i of one taken right beside sample i of the other."""

  ours: list[float]
  theirs: list[float]

  @property
  def medians(self) -> tuple[float, float]:
    return statistics.median(self.ours), statistics.median(self.theirs)

  @property
  def value(self) -> float:
    ours, theirs = self.medians
    return ours / theirs

  @property
  def middle(self) -> tuple[float, float]:
    """Quartiles of the ratios pair by pair."""
    pairs = [a / b for a, b in zip(self.ours, self.theirs)]
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return low, high


def compare(
  ours: Run, theirs: Run, *, pairs: int, calls: int, clock=time.perf_counter, pause: float = 0.0
) -> Ratio:
  """Times `calls` steps of each side by turns, `pairs` times, after one turn each that is not counted.

  The side that goes first alternates, so that neither always finds the caches as the other left them.
  `clock` gives seconds. Before each sample `pause` seconds pass, in which the other side's threads go to sleep.
  """
  sides = ours, theirs
  times: Ratio = Ratio([], [])
  for run in sides:
    seconds(run, calls, clock)
  for pair in range(pairs):
    for side in (0, 1) if pair % 2 else (1, 0):
      time.sleep(pause)
      times[side].append(seconds(sides[side], calls, clock))
  return times


def seconds(run: Run, calls: int, clock=time.perf_counter) -> float:
  """Per step, until the last result is there."""
  start = clock()
  jax.block_until_ready(run(calls))
  return (clock() - start) / calls


def between(batches: Iterator, theirs: Run, *, every: int, times: Ratio) -> Iterator:
  """Passes batches on and measures who takes them: after each `every` of them, as many steps of `theirs`.

  The taker must have finished its steps whenever it asks for batch `every * k`, as a loop has that reports
  every `every` steps. Its first turn, in which it compiles, is not counted.
  """
  seconds(theirs, every)
  start = time.perf_counter()
  for taken, batch in enumerate(batches):
    if taken and taken % every == 0:
      own = (time.perf_counter() - start) / every
      if taken > every:
        times.ours.append(own)
        times.theirs.append(seconds(theirs, every))
      start = time.perf_counter()
    yield batch
