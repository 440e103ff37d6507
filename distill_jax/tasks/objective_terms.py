"""The objective's own terms on the validation set: what is measured where no other task fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax import reduce
from distill_jax.types import Batch, Metric, Objective, Outputs, Task, Variables

OUTPUT = "objective/terms"
"""The output under which an evaluation passes the terms to the task."""


def objective_terms(names: Sequence[str]) -> Task:
  """Returns the task whose metrics are the validation 'loss' and each term of the objective,
  unweighted.

  `train.fit` evaluates the terms next to the student's outputs; elsewhere use a task of the data.

  Args:
    names: of the objective's terms.
  """

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    del batch, teacher
    if OUTPUT not in outputs:
      raise ValueError(
        "task: expected a task that needs no objective, got tasks.objective_terms: pass one such "
        "as tasks.classification()"
      )
    return dict(outputs[OUTPUT])

  def compute(statistics: Mapping[str, Any]) -> dict[str, float]:
    values = {name: float(reduce.value(statistics[name][:2])) for name in names}
    weights = {name: float(reduce.value(statistics[name][2:])) for name in names}
    return {"loss": sum(weights[name] * value for name, value in values.items())} | values

  metrics = [Metric("loss", "loss", "", "min", ".4f")]
  metrics += [Metric(name, name, "", "min", ".4f") for name in names if name != "loss"]
  return Task(metrics=tuple(metrics), statistics=statistics, compute=compute, references=())


def evaluate_terms(
  objective: Objective,
  learned: Variables,
  outputs: Outputs,
  teacher: Outputs,
  batch: Batch,
  *,
  step,
  key,
) -> dict[str, tuple]:
  """Returns (sum, count, sum of the weight, number of batches) of each term of the objective.

  Raises:
    ValueError: a term needs what the batch, or the teacher, does not have; the term is named.
  """
  terms, _ = objective.apply(
    learned.params, learned.state, outputs, teacher, batch, step=step, key=key
  )
  statistics = {}
  for name, (weight, value) in terms.items():
    pair = reduce.total(*value) if isinstance(value, tuple) else reduce.total(value)
    statistics[name] = (*pair, *reduce.total(weight))
  return statistics
