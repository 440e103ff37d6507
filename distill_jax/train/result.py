"""Holds what `fit` returns."""

from typing import Any, NamedTuple

import jax

from distill_jax.train.prediction import predict
from distill_jax.types import Metric, Model, Task, TrainState, Variables


class FitResult(NamedTuple):
  """The result of `fit`.

  Attributes:
    student: the Model that was trained.
    variables: its variables from the best evaluation; without an evaluation, the last ones. Of an
      optimizer that averages parameters, those averages (`evaluation_variables`).
    state: the train state after the last step.
    history: dicts as in metrics.jsonl, in order.
    task: what was measured: that of the call, or the one that fits outputs and labels.
    best: the task's metric that chose `variables`.
    objective_variables: the objective's, of the same step as `variables`: projections, banks.
    best_step: the step of `variables`, whose scores the line of `history` has; None without an
      evaluation.
    stop_reason: why training ended before its last step: `Evaluation.patience`, or Ctrl-C without a
      folder; '' where it did not. `state.step` is the step.

  Example in `fit`.
  """

  student: Model
  variables: Variables
  state: TrainState
  history: list[dict[str, Any]]
  task: Task
  best: Metric
  objective_variables: Variables
  best_step: int | None = None
  stop_reason: str = ""

  @property
  def model(self) -> Model:
    """The student with its trained `variables`: the teacher of another `fit`, or of a cache."""
    return self.student._replace(variables=self.variables)

  def predict(self, examples: Any, *, batch_size: int = 256) -> dict[str, Any]:
    """Returns the student's outputs as host arrays: of a batch, a `Source` or batches
    (`train.predict`).
    """
    return predict(self.student, self.variables, examples, batch_size=batch_size)

  def __repr__(self) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(self.variables.params))
    last = self.history[-1] if self.history else {}
    return f"FitResult(step={int(self.state.step)}, parameters={size:,}, last={last})"
