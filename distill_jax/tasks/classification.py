"""Classification with one label per example."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.objectives.calls import batch_entry, has_true_label, outputs_of, valid_rows
from distill_jax.objectives.class_labels import check_ignore_label, class_labels
from distill_jax.tasks.logits import (
  AGREEMENT,
  ECE,
  NLL,
  OUTSIDE,
  TEACHER_KL,
  calibration_error,
  confusion_matrix,
  count_outside,
  logit_statistics,
  means,
)
from distill_jax.types import Batch, Metric, Outputs, Task

ACCURACY = Metric("accuracy", "accuracy", "%", "max", ".2%")
MAX_CONFUSION_CLASSES = 1000
"""With more classes no confusion matrix is counted: it would take 1.9 GB for 21,841."""

_METRICS = (
  ACCURACY,
  Metric("top5", "top-5 accuracy", "%", "max", ".2%", detail=2),
  Metric("macro_precision", "macro precision", "%", "max", ".2%", detail=2),
  Metric("macro_recall", "macro recall", "%", "max", ".2%", detail=2),
  Metric("macro_f1", "macro F1", "%", "max", ".2%", detail=2),
  NLL,
  Metric("mae", "mean absolute error of probabilities", "%", "min", ".2%", detail=2),
  ECE,
  AGREEMENT,
  TEACHER_KL,
)


def classification(
  *, label: str = "label", output: str = "logits", ignore_label: int | None = None
) -> Task:
  """Returns the task of logits [B, C] and labels int [B], or rows of probabilities [B, C].

  Its metrics are accuracy, top-5 accuracy (with more than 5 classes), macro precision, recall and
  F1 over the classes that occur as label or prediction (scikit-learn's `average="macro",
  zero_division=0`), negative log-likelihood, expected calibration error (Guo et al. 2017, equation
  3; 15 bins) and, next to a teacher, agreement with it and KL(teacher || student). A negative label
  marks an example without one, left out of all but the comparison with the teacher. Of rows of
  probabilities the most probable class is the label; the negative log-likelihood is then the cross
  entropy with the row, and the mean absolute error of the probabilities is measured too.

  One logit is `tasks.binary`.

  Args:
    label: the batch's entry with the labels.
    output: the output of both networks with the logits.
    ignore_label: a further number that is no label (255, -100); None: negative ones only.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.classification()
  >>> outputs = {"logits": jnp.array([[2.0, 0.0], [1.0, 0.0]])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([0, 1])}, None)
  >>> round(task.compute(sums)["accuracy"], 4)
  0.5
  """
  check_ignore_label(ignore_label)

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    logits = _logits(outputs, output)
    teacher_logits = None if teacher is None else outputs_of(teacher, output, "teacher")
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
      raise ValueError(
        f"teacher {output!r}: expected the student's shape {logits.shape}, got "
        f"{teacher_logits.shape}"
      )
    labels = batch_entry(batch, label)
    return class_statistics(logits, labels, batch.get("where"), teacher_logits, label, ignore_label)

  def train_metrics(outputs: Outputs, batch: Batch) -> dict[str, reduce.Pair]:
    return train_accuracy(outputs[output], batch, label, ignore_label)

  def predict(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    del batch
    logits = outputs[output].astype(jnp.float32)
    return {"class": logits.argmax(-1), "confidence": jax.nn.softmax(logits).max(-1)}

  return Task(
    metrics=_METRICS,
    statistics=statistics,
    compute=class_scores,
    label_classes=lambda outputs: {label: outputs_of(outputs, output, "student").shape[-1]},
    ignore_label=ignore_label,
    train_metrics=train_metrics,
    predict=predict,
    references=(),
    figures=_figures,
    figure_references=(label, "id", "image"),
  )


def class_statistics(
  logits: jax.Array,
  labels: jax.Array,
  where: jax.Array | None,
  teacher_logits: jax.Array | None,
  entry: str,
  ignore_label: int | None,
) -> dict[str, Any]:
  """Returns sums over rows: those of `logit_statistics`, 'per_class' int [C, 3] (correct, predicted
  and labeled rows), up to 1,000 classes 'confusion' int [C, C], and 'top5' from 6 classes on.

  Args:
    logits: [rows, C], float32 or wider.
    labels: int [rows], or rows of probabilities [rows, C].
    where: bool [rows], those that count; None: all.
    teacher_logits: [rows, C], to compare with; None: nothing is compared.
    entry: the labels' name, for messages.
    ignore_label: a further number that is no label.
  """
  rows, classes = logits.shape
  valid = jnp.ones(rows, bool) if where is None else jnp.asarray(where)
  targets, outside = None, jnp.zeros(rows, bool)
  if jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape:
    targets = labels.astype(logits.dtype)
    index, labeled = labels.argmax(-1), labels.sum(-1) > 0
  else:
    index, labeled, outside = class_labels(
      labels, logits.shape, where=valid, entry=entry, ignore_label=ignore_label
    )
  labeled &= valid & ~outside
  predicted = logits.argmax(-1)
  statistics = logit_statistics(logits, index, labeled, valid, teacher_logits, targets=targets)
  statistics[OUTSIDE] = count_outside(outside, valid)
  statistics["per_class"] = _per_class(predicted, index, labeled, classes)
  if classes <= MAX_CONFUSION_CLASSES:
    statistics["confusion"] = confusion_matrix(index, predicted, labeled, classes)
  if classes > 5:
    statistics["top5"] = reduce.total(_rank(logits, index) < 5, labeled)
  return statistics


def class_scores(statistics: Mapping[str, Any]) -> dict[str, float]:
  """Returns the scores of added `class_statistics`."""
  scores = means(statistics)
  if "accuracy" not in scores:
    return scores  # Nothing has a label: no score of labels exists.
  correct, predicted, labeled = np.asarray(statistics["per_class"], np.float64).T
  classes = (predicted + labeled > 0).sum()
  return scores | {
    "ece": calibration_error(statistics["calibration"]),
    "macro_precision": float((correct / np.maximum(predicted, 1)).sum() / classes),
    "macro_recall": float((correct / np.maximum(labeled, 1)).sum() / classes),
    "macro_f1": float((2 * correct / np.maximum(predicted + labeled, 1)).sum() / classes),
  }


def train_accuracy(
  logits: jax.Array, batch: Batch, entry: str, ignore_label: int | None
) -> dict[str, reduce.Pair]:
  """Returns 'accuracy' of logits [..., C] and labels int [...]; {} of mixed labels, or none."""
  label = batch.get(entry)
  if label is None or jnp.issubdtype(label.dtype, jnp.floating):
    return {}  # mixed labels, or none
  where = batch.get("where")
  index, labeled, outside = class_labels(
    label, logits.shape, where=where, entry=entry, ignore_label=ignore_label
  )
  where = valid_rows(batch, has_true_label(batch, labeled & ~outside))
  return {"accuracy": reduce.total(logits.argmax(-1) == index, where)}


def _figures(entries, references, class_names):
  from distill_jax.tasks._class_figures import class_figures  # matplotlib: reports alone need it

  return class_figures(entries, references, class_names)


def _logits(outputs: Outputs, output: str) -> jax.Array:
  """Returns the logits [B, C] in float32 or wider."""
  logits = outputs_of(outputs, output, "student")
  if logits.ndim != 2 or 0 in logits.shape:
    raise ValueError(
      f"{output!r}: expected [rows, classes], at least one of each, got {logits.shape}"
    )
  if logits.shape[-1] == 1:
    raise ValueError(
      f"{output!r}: expected logits of at least 2 classes, got {logits.shape}, where every "
      "prediction is the same class: use tasks.binary, or two logits"
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
