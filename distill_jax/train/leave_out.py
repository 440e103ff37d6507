"""Scores without one part of the examples at a time, from which standard errors follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.types import Task

PARTS = 100
_MIN_PARTS = 20
_MAX_BYTES = 2**27


class LeaveOut:
  """Adds up a task's statistics by part of the examples; batch i is in part i modulo their number.

  There are `PARTS` parts, or fewer where their statistics would take more than 128 MiB: those of
  1,000 classes are 4 MB with their confusion matrix.
  """

  def __init__(self, task: Task):
    self._task = task
    self._parts: list[Any] = []
    self._batches = 0

  def add(self, statistics: Any) -> None:
    """Adds one batch's statistics."""
    statistics = jax.tree.map(_wide, jax.device_get(statistics))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(statistics))
    number = min(PARTS, max(1, _MAX_BYTES // max(size, 1)))
    if len(self._parts) < number:
      self._parts.append(statistics)
    else:
      index = self._batches % number
      self._parts[index] = jax.tree.map(np.add, self._parts[index], statistics)
    self._batches += 1

  def scores(self) -> dict[str, np.ndarray]:
    """Returns each score without each of the parts; {} with fewer than 20 parts."""
    if len(self._parts) < _MIN_PARTS:
      return {}
    total = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *self._parts)
    return _by_name(
      [self._task.compute(jax.tree.map(np.subtract, total, part)) for part in self._parts]
    )


def prediction_scores(task: Task, batches: Sequence[Any]) -> dict[str, np.ndarray]:
  """Returns each score of predictions without each of 20 parts of the examples; {} with fewer
  batches. Batch i is in part i modulo 20.

  Args:
    task: its `evaluate_predictions` scores any part.
    batches: {'predictions': {name: array}, 'references': {name: array}} of valid rows each.
  """
  if len(batches) < _MIN_PARTS:
    return {}
  scores = []
  for part in range(_MIN_PARTS):
    rows = join_rows([x for number, x in enumerate(batches) if number % _MIN_PARTS != part])
    assert task.evaluate_predictions is not None
    scores.append(task.evaluate_predictions(rows["predictions"], rows["references"]))
  return _by_name(scores)


def join_rows(batches: Sequence[Any]) -> Any:
  """Returns the arrays of all batches, one after the other.

  Where their sizes differ, such as the lengths of texts, smaller ones are filled up at the end:
  integers with -1 (unsigned ones with their largest value), all others with 0.
  """
  return jax.tree.map(lambda *leaves: np.concatenate(_filled_up(leaves)), *batches)


def _filled_up(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
  """Returns the arrays with equal axes after the first."""
  if len({x.shape[1:] for x in arrays}) == 1 or len({x.ndim for x in arrays}) > 1:
    return arrays
  sizes = np.max([x.shape[1:] for x in arrays], axis=0)
  fill = np.array(-1).astype(arrays[0].dtype) if arrays[0].dtype.kind in "iu" else 0
  return [
    np.pad(
      x, [(0, 0), *((0, size - n) for size, n in zip(sizes, x.shape[1:]))], constant_values=fill
    )
    for x in arrays
  ]


def _by_name(scores: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
  """Returns the scores that all parts have."""
  names = set.intersection(*map(set, scores))
  return {name: np.array([score[name] for score in scores]) for name in sorted(names)}


def _wide(leaf: Any) -> np.ndarray:
  """Returns the array in 64 bits: sums minus parts lose nothing."""
  leaf = np.asarray(leaf)
  return leaf.astype(np.int64 if np.issubdtype(leaf.dtype, np.integer) else np.float64)
