"""Several labels per example: each class is present or absent."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import reduce
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.objectives.class_labels import check_ignore_label
from distill_jax.tasks.logits import OUTSIDE, count_outside, means
from distill_jax.types import Batch, Metric, Outputs, Task


def multi_label(
  *, label: str = "label", output: str = "logits", ignore_label: int | None = None
) -> Task:
  """Returns the task of logits [B, C] and labels [B, C] of 0 and 1 (any dtype); a class is
  predicted where its logit is > 0.

  Its metrics are macro F1 over the classes (0 for a class that neither occurs nor is predicted),
  micro F1, the fraction of examples whose classes are all correct (subset accuracy), mean average
  precision over the classes that occur (scikit-learn's `average_precision_score`), and binary cross
  entropy per class in nats. An example with a negative integer among its labels does not count.

  Args:
    label: the batch's entry with the labels.
    output: the student's output with the logits.
    ignore_label: a further number that is no label (255, -100); None: negative integers only.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.multi_label()
  >>> outputs = {"logits": jnp.array([[2.0, -1.0]])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([[1, 0]])}, None)
  >>> round(task.compute(sums)["macro_f1"], 4)
  0.5
  """
  check_ignore_label(ignore_label)

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    del teacher
    logits, labels, rows = _inputs(
      outputs_of(outputs, output, "student"),
      batch_entry(batch, label),
      batch.get("where"),
      label,
    )
    labeled = _is_labeled(batch_entry(batch, label), ignore_label)
    rows &= labeled
    labels = jnp.where(labeled[:, None], labels, 0)
    predicted = logits > 0
    present = labels > 0.5
    counted = rows[:, None]
    columns = (predicted & present, predicted, present)
    per_class = jnp.stack([(x & counted).sum(0, dtype=jnp.int32) for x in columns], -1)
    nll = optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1)
    outside = (labels < 0) | (labels > 1)
    return {
      OUTSIDE: count_outside(outside, jnp.broadcast_to(counted, outside.shape)),
      "per_class": per_class,
      "exact": reduce.total((predicted == present).all(-1), rows),
      "nll": reduce.total(nll, rows),
    }

  def predict(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    return {"logits": outputs[output].astype(jnp.float32)}

  def evaluate_predictions(predictions, references) -> dict[str, float]:
    labels = np.asarray(references[label])
    labeled = np.asarray(_is_labeled(labels, ignore_label))
    return _mean_average_precision(predictions["logits"][labeled], labels[labeled])

  return Task(
    metrics=(
      Metric("macro_f1", "macro F1", "%", "max", ".2%"),
      Metric("micro_f1", "micro F1", "%", "max", ".2%"),
      Metric("map", "mean average precision", "%", "max", ".2%"),
      Metric("exact", "subset accuracy", "%", "max", ".2%"),
      Metric("nll", "binary cross entropy", "nats", "min", ".4f"),
    ),
    statistics=statistics,
    compute=_compute,
    ignore_label=ignore_label,
    predict=predict,
    evaluate_predictions=evaluate_predictions,
    references=(label,),
  )


def _is_labeled(labels: Any, ignore_label: int | None) -> Any:
  """Returns which rows [B] of labels [B, C] count."""
  labels = jnp.asarray(labels)
  missing = labels < 0 if jnp.issubdtype(labels.dtype, jnp.signedinteger) else labels != labels
  if ignore_label is not None:
    missing |= labels == ignore_label
  return ~missing.any(-1)


def _inputs(logits, labels, where, name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
  if logits.ndim != 2 or labels.shape != logits.shape:
    raise ValueError(
      f"{name}: expected 0 or 1 for each of the logits {logits.shape}, got {labels.dtype} "
      f"{labels.shape}: use tasks.classification for one class number per example, tasks.binary "
      "for one logit"
    )
  rows = jnp.ones(len(logits), bool) if where is None else where
  dtype = reduce.common_dtype(logits.dtype, jnp.float32)
  return logits.astype(dtype), labels.astype(dtype), rows


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  outside = int(statistics[OUTSIDE])
  if outside:
    raise ValueError(
      f"label: expected 0, 1 or a probability for each class, got {outside} other numbers: use "
      "tasks.classification for one class number per example"
    )
  correct, predicted, present = np.asarray(statistics["per_class"], np.float64).T
  scores = means(statistics)
  if not scores:
    return scores
  both = predicted + present
  macro = (2 * correct / np.maximum(both, 1)).mean()
  micro = 2 * correct.sum() / max(both.sum(), 1)
  return scores | {"macro_f1": float(macro), "micro_f1": float(micro)}


def _mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Returns 'map'; nothing where no class occurs."""
  from sklearn.metrics import average_precision_score

  present = np.asarray(labels) > 0.5
  occurs = present.any(0)
  if not occurs.any():
    return {}
  score = average_precision_score(present[:, occurs], logits[:, occurs], average="macro")
  return {"map": float(score)}
