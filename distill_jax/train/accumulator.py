"""Adds up what evaluation measures of one model, batch by batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.train.leave_out import LeaveOut, join_rows, prediction_scores
from distill_jax.types import Task


class Evaluated(NamedTuple):
  """What an evaluation of one model returns.

  Attributes:
    scores: {metric name: value}.
    statistics: the task's added sums, host arrays.
    predictions: {name: array [N, ...]} of all valid examples, in order; {} where none were asked
      for.
    leave_out: {metric name: the scores without each of some parts of the examples, float [K]}; {}
      where none were asked for.
  """

  scores: dict[str, float]
  statistics: Any
  predictions: dict[str, np.ndarray]
  leave_out: dict[str, np.ndarray]


class Accumulator:
  """Adds up what an evaluation's step returns: sums on the device, rows on the host."""

  def __init__(self, task: Task, leave_out: bool = False):
    self._task = task
    self._leave_out = LeaveOut(task) if leave_out else None
    self._statistics: Any = None
    self._rows: list[dict[str, Any]] = []

  def add(self, statistics: Any, rows: dict[str, Any]) -> None:
    """Adds one batch's."""
    first = self._statistics is None
    self._statistics = statistics if first else _add(self._statistics, statistics)
    if self._leave_out is not None:
      self._leave_out.add(statistics)
    if rows:
      rows = jax.device_get(rows)
      where = rows.pop("where")
      self._rows.append(jax.tree.map(lambda x: x[where], rows))

  def result(self) -> Evaluated:
    """Returns the scores of all batches.

    Raises:
      ValueError: there was no batch.
    """
    if self._statistics is None:
      raise ValueError(
        "evaluation: expected at least one batch, got none: give a Source or batches"
      )
    statistics = jax.device_get(self._statistics)
    scores = self._task.compute(statistics)
    predictions: dict[str, np.ndarray] = {}
    leave_out = {} if self._leave_out is None else self._leave_out.scores()
    if self._rows:
      rows = join_rows(self._rows)
      predictions = rows["predictions"]
      if self._task.evaluate_predictions is not None:
        scores = scores | self._task.evaluate_predictions(predictions, rows["references"])
        if self._leave_out is not None and self._task.scores_parts:
          leave_out = leave_out | prediction_scores(self._task, self._rows)
    return Evaluated(scores, statistics, predictions, leave_out)


@jax.jit
def _add(total, statistics):
  return jax.tree.map(jnp.add, total, statistics)
