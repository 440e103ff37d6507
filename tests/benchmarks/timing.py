"""Times two ways to do the same work by turns."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

Run = Callable[[int], Any]
"""Runs a number of steps and returns arrays that are ready when the last one is done."""


class Ratio(NamedTuple):
  """Seconds per step of both sides; sample i of one was measured next to sample i of the other."""

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
    """The quartiles of the ratios pair by pair."""
    pairs = [a / b for a, b in zip(self.ours, self.theirs)]
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return low, high


def compare(
  ours: Run, theirs: Run, *, pairs: int, calls: int, clock=time.perf_counter, pause: float = 0.0
) -> Ratio:
  """Times `calls` steps of each side by turns, `pairs` times.

  One turn of each before them is not counted. The side that goes first alternates, so that neither
  always meets the other's caches.

  Args:
    ours, theirs: the two sides.
    pairs: number of samples of each side.
    calls: steps in a sample.
    clock: returns seconds.
    pause: seconds before each sample, in which the other side's threads go to sleep.
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
  """Returns the seconds per step until the last result is ready."""
  start = clock()
  jax.block_until_ready(run(calls))
  return (clock() - start) / calls


def between(batches: Iterator, theirs: Run, *, every: int, times: Ratio) -> Iterator:
  """Yields batches and times their consumer: after each `every` of them, as many steps of `theirs`.

  The consumer must have finished its steps whenever it requests batch `every * k`, like a loop that
  reports every `every` steps. Its first turn, which compiles, is not counted.
  """
  seconds(theirs, every)
  start = time.perf_counter()
  for count, batch in enumerate(batches):
    if count and count % every == 0:
      consumer = (time.perf_counter() - start) / every
      if count > every:
        times.ours.append(consumer)
        times.theirs.append(seconds(theirs, every))
      start = time.perf_counter()
    yield batch
