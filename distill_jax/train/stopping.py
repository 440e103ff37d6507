"""Ends training before its last step: after updates that are not finite, or evaluations that bring
nothing.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.train.arguments import Arguments
from distill_jax.train.nonfinite import find_nonfinite
from distill_jax.types import Batch, Metric, TrainState


class NonFiniteError(RuntimeError):
  """Raised when training is aborted after too many updates in a row that were not finite.

  Attributes:
    state: the last good train state; no update that was not finite has entered it.

  >>> import optax
  >>> from distill_jax import models, objectives, train
  >>> batch = {"x": np.ones((8, 2), np.float32), "label": np.zeros(8, int)}
  >>> student = models.from_apply(lambda key, x: jnp.zeros((2, 2)), lambda w, x: x @ w, inputs="x")
  >>> objective = objectives.weighted(hard=(1.0, objectives.labels()))
  >>> try:
  ...   train.fit(student, None, objective, optax.sgd(np.inf), [batch], steps=20, batch_size=8)
  ... except train.NonFiniteError as error:
  ...   print(error.state.params["student"])  # those from before
  [[0. 0.]
   [0. 0.]]
  """

  def __init__(self, message: str, state: TrainState):
    super().__init__(message)
    self.state = state


class Patience:
  """Counts the evaluations in a row without a better score than the best one before them.

  The score is that of one metric: a lower loss at an equal accuracy is no better score, and one
  that is not finite is none. Of equal scores the earliest is the best.
  """

  def __init__(self, metric: Metric, limit: int | None, notes: Mapping[str, Any]):
    """Begins to count.

    Args:
      metric: chooses the best variables.
      limit: number of evaluations after which training stops; None: it never does.
      notes: of an earlier part of the run, from `notes`; of another metric or empty ones the count
        begins at 0.
    """
    self._metric, self._limit = metric, limit
    known = notes if notes.get("metric") == metric.name else {}
    self._score: float | None = known.get("score")
    self._step: int = known.get("step", 0)
    self._count: int = known.get("count", 0)

  def update(self, step: int, scores: Mapping[str, float]) -> None:
    """Counts an evaluation."""
    score = float(scores[self._metric.name])
    sign = 1 if self._metric.better == "max" else -1
    best = self._score
    if math.isfinite(score) and (best is None or sign * score > sign * best):
      self._score, self._step, self._count = score, step, 0
    else:
      self._count += 1

  def notes(self) -> dict[str, Any]:
    """Returns the count as JSON values, to be stored with a checkpoint."""
    return {
      "metric": self._metric.name,
      "score": self._score,
      "step": self._step,
      "count": self._count,
    }

  def stop_reason(self) -> str:
    """Returns why training stops now; '' while it goes on."""
    if self._limit is None or self._count < self._limit:
      return ""
    name = self._metric.name
    if self._score is None:
      return f"patience: {name} was not finite in {self._count} evaluations in a row"
    return (
      f"patience: {name} was not better than {self._score:.4g} of step {self._step} in "
      f"{self._count} evaluations in a row"
    )


def warn_of_idle_patience(patience: int | None, steps: int, every: int) -> None:
  """Warns if training cannot end early: the first evaluation has none before it, and at the last
  one training ends anyway.
  """
  evaluations = -(-steps // every)
  if patience is not None and patience > evaluations - 2:
    warnings.warn(
      f"patience: expected at least {patience + 2} evaluations for {patience} to stop training, "
      f"got {evaluations} in {steps} steps: evaluate more often",
      stacklevel=2,
    )


def check_skips(
  arguments: Arguments, state: TrainState, teacher_variables: Any, batch: Batch
) -> None:
  """Checks that training goes on to change the parameters.

  Args:
    arguments: of `fit`.
    state, teacher_variables, batch: of the last step.

  Raises:
    NonFiniteError: `max_skips` updates in a row were not finite; it names what was not.
  """
  skips = jax.device_get(state.skips)
  max_skips = arguments.run.max_skips
  if skips.longest < max_skips:
    return
  names = find_nonfinite(arguments, state, teacher_variables, batch) if skips.streak else []
  cause = f"; not finite in its batch: {', '.join(names)}" if names else ""
  raise NonFiniteError(
    f"max_skips: expected fewer than {max_skips} updates in a row that are not finite, got "
    f"{skips.longest} ({skips.total} in all) up to step {int(state.step)}{cause}; the parameters "
    "are those from before: look for NaN in the teacher's outputs, or lower the learning rate",
    state,
  )
