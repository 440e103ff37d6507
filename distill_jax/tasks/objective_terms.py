"""The objective's own terms on the validation set: what is measured where no other task fits."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.tasks.logits import AGREEMENT, TEACHER_KL, means
from distill_jax.types import Batch, Metric, Objective, Outputs, Task, Variables

OUTPUT = "objective/terms"
"""The output under which an evaluation passes the terms to the task."""


def objective_terms(names: Sequence[str]) -> Task:
  """Returns the task of examples without labels.

  Its metrics are the validation 'loss' and each term of the objective, unweighted, and, where the
  teacher gives 'logits' of the student's shape, KL(teacher || student) and agreement with it. A
  term without a valid value (labels, where there are none) has no score, and no part in the loss.

  `train.fit` evaluates the terms next to the student's outputs; elsewhere there are none.

  Args:
    names: of the objective's terms; none: only the comparison with the teacher.

  >>> from distill_jax import tasks
  >>> [metric.name for metric in tasks.objective_terms(["soft"]).metrics][:2]
  ['loss', 'soft']
  """

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    if names and OUTPUT not in outputs:
      raise ValueError(
        "task: expected a task that needs no objective, got tasks.objective_terms: pass one such "
        "as tasks.classification()"
      )
    terms = {"terms": dict(outputs[OUTPUT])} if names else {}
    return terms | _comparison(outputs, batch, teacher)

  def compute(sums: Mapping[str, Any]) -> dict[str, float]:
    return _term_scores(sums.get("terms", {})) | means(sums)

  terms = _term_metrics(names) if names else ()
  return Task(
    metrics=(*terms, TEACHER_KL, AGREEMENT),
    statistics=statistics,
    compute=compute,
    references=(),
  )


def with_terms(task: Task, names: Sequence[str]) -> Task:
  """Returns a task with the metrics of `objective_terms` too, where it has none of the name; they
  have scores where the terms are evaluated (`train.fit`).
  """
  own = {metric.name for metric in task.metrics}
  terms = [metric for metric in _term_metrics(names) if metric.name not in own]

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    return {
      "task": task.statistics(outputs, batch, teacher),
      "terms": dict(outputs.get(OUTPUT, {})),
    }

  def compute(sums: Mapping[str, Any]) -> dict[str, float]:
    scores = task.compute(sums["task"])
    others = {name: x for name, x in _term_scores(sums["terms"]).items() if name not in own}
    return scores | others

  return task._replace(
    metrics=(*task.metrics, *terms), statistics=statistics, compute=compute, figures=None
  )


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


def _term_metrics(names: Sequence[str]) -> list[Metric]:
  metrics = [Metric("loss", "loss", "", "min", ".4f")]
  return metrics + [Metric(name, name, "", "min", ".4f") for name in names if name != "loss"]


def _term_scores(terms: Mapping[str, tuple]) -> dict[str, float]:
  """Returns the terms that counted something, and their weighted sum."""
  counted = {name: sums for name, sums in terms.items() if sums[1] > 0}
  values = {name: float(reduce.value(sums[:2])) for name, sums in counted.items()}
  weights = {name: float(reduce.value(sums[2:])) for name, sums in counted.items()}
  loss = sum(weights[name] * value for name, value in values.items())
  return {"loss": loss} | values if values else {}


def _comparison(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
  """Returns how the teacher's logits compare; nothing where one has none, or of another shape."""
  if teacher is None or "logits" not in teacher or "logits" not in outputs:
    return {}
  z, t = outputs["logits"], teacher["logits"]
  if getattr(t, "shape", None) != z.shape or z.ndim < 2 or z.shape[-1] < 2:
    return {}
  where = batch.get("where")
  return {
    "teacher_kl": reduce.total(kl_divergence(z, t), where),
    "agreement": reduce.total(jnp.argmax(z, -1) == jnp.argmax(t, -1), where),
  }
