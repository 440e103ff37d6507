"""Classification with one label per example."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.objectives.calls import batch_entry, has_true_label, outputs_of, valid_rows
from distill_jax.tasks.logits import (
  AGREEMENT,
  ECE,
  NLL,
  TEACHER_KL,
  calibration_error,
  confusion_matrix,
  logit_statistics,
  means,
  num_classes,
)
from distill_jax.types import Batch, Metric, Outputs, Task

ACCURACY = Metric("accuracy", "accuracy", "%", "max", ".2%")
MAX_CONFUSION_CLASSES = 1000
"""With more classes no confusion matrix is counted: it would take 1.9 GB for 21,841."""

_METRICS = (
  ACCURACY,
  Metric("top5", "top-5 accuracy", "%", "max", ".2%", detail=2),
  Metric("precision", "macro precision", "%", "max", ".2%", detail=2),
  Metric("recall", "macro recall", "%", "max", ".2%", detail=2),
  Metric("f1", "macro F1", "%", "max", ".2%", detail=2),
  NLL,
  ECE,
  AGREEMENT,
  TEACHER_KL,
)


def classification() -> Task:
  """Returns the task of logits [B, C] and integer labels [B].

  Its metrics are accuracy, top-5 accuracy (with more than 5 classes), macro precision, recall and
  F1 over the classes that occur as label or prediction (scikit-learn's `average="macro",
  zero_division=0`), negative log-likelihood, expected calibration error (Guo et al. 2017, equation
  3; 15 bins) and, next to a teacher, agreement with it and KL(teacher || student). A negative label
  marks an example without one, left out of all but the comparison with the teacher.
  """
  return Task(
    metrics=_METRICS,
    statistics=_statistics,
    compute=_compute,
    num_classes=num_classes,
    train_metrics=_train_metrics,
    predict=_predict,
    references=("label", "id", "image"),
    figures=_figures,
  )


def _statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
  logits = _logits(outputs, batch)
  labels = batch_entry(batch, "label")
  rows, classes = logits.shape
  valid = jnp.asarray(batch.get("where", np.ones(rows, bool)))
  labeled = valid & (labels >= 0)
  label = jnp.where(labels >= 0, labels, 0).astype(int)
  teacher_logits = None if teacher is None else teacher["logits"]
  if teacher_logits is not None and teacher_logits.shape != logits.shape:
    raise ValueError(
      f"teacher 'logits': expected the student's shape {logits.shape}, got {teacher_logits.shape}"
    )
  statistics = logit_statistics(logits, labels, valid, teacher_logits)
  statistics["per_class"] = _per_class(logits.argmax(-1), label, labeled, classes)
  if classes <= MAX_CONFUSION_CLASSES:
    statistics["confusion"] = confusion_matrix(labels, logits.argmax(-1), labeled, classes)
  if classes > 5:
    statistics["top5"] = reduce.total(_rank(logits, label) < 5, labeled)
  return statistics


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  scores = means(dict(statistics)) | {"ece": calibration_error(statistics["calibration"])}
  correct, predicted, labeled = np.asarray(statistics["per_class"], np.float64).T
  classes = max((predicted + labeled > 0).sum(), 1)
  precision = (correct / np.maximum(predicted, 1)).sum() / classes
  recall = (correct / np.maximum(labeled, 1)).sum() / classes
  f1 = (2 * correct / np.maximum(predicted + labeled, 1)).sum() / classes
  return scores | {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _train_metrics(outputs: Outputs, batch: Batch) -> dict[str, reduce.Pair]:
  label, logits = batch.get("label"), outputs["logits"]
  if label is None or not jnp.issubdtype(label.dtype, jnp.integer):
    return {}  # mixed labels, or none
  where = valid_rows(batch, has_true_label(batch, label >= 0))
  return {"accuracy": reduce.total(logits.argmax(-1) == label.astype(int), where)}


def _predict(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  del batch
  logits = outputs["logits"].astype(jnp.float32)
  return {"class": logits.argmax(-1), "confidence": jax.nn.softmax(logits).max(-1)}


def _figures(entries, references, class_names):
  from distill_jax.tasks._class_figures import class_figures  # matplotlib: reports alone need it

  return class_figures(entries, references, class_names)


def _logits(outputs: Outputs, batch: Batch) -> jax.Array:
  logits = outputs_of(outputs, "logits", "student")
  if logits.ndim != 2 or 0 in logits.shape:
    raise ValueError(
      f"'logits': expected [rows, classes], at least one of each, got {logits.shape}"
    )
  label = batch_entry(batch, "label")
  if label.shape != logits.shape[:1] or not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"'label': expected integers {logits.shape[:1]}, one per row of the logits, got "
      f"{label.dtype} {label.shape}: "
      "use tasks.multi_label for several labels per example, tasks.regression for numbers"
    )
  return logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))


def _per_class(predicted, label, labeled, classes: int) -> jax.Array:
  """Returns int32 [classes, 3]: correct, predicted and labeled examples of each class."""
  rows = labeled.astype(jnp.int32)
  zeros = jnp.zeros(classes, jnp.int32)
  correct = zeros.at[label].add((labeled & (predicted == label)).astype(jnp.int32))
  return jnp.stack([correct, zeros.at[predicted].add(rows), zeros.at[label].add(rows)], -1)


def _rank(logits, label) -> jax.Array:
  """Returns how many classes are predicted before the label; the last position if a logit is
  NaN.
  """
  label_logit = jnp.take_along_axis(logits, label[:, None], -1)
  index = jnp.arange(logits.shape[-1])[None]
  behind = (label_logit > logits) | ((label_logit == logits) & (label[:, None] < index))
  return logits.shape[-1] - 1 - behind.sum(-1)
