"""Semantic segmentation: one class per pixel or voxel."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.objectives.class_labels import check_ignore_label, class_labels
from distill_jax.tasks.logits import (
  AGREEMENT,
  OUTSIDE,
  TEACHER_KL,
  confusion_matrix,
  count_outside,
  means,
)
from distill_jax.types import Batch, Metric, Outputs, Task


def segmentation(
  *, label: str = "label", output: str = "logits", ignore_label: int | None = None
) -> Task:
  """Returns the task of logits [B, ..., C] and integer labels [B, ...] on the same grid.

  Its metrics come from one running confusion matrix [C, C]: mean intersection over union and mean
  Dice coefficient over the classes that occur as label or prediction, and pixel accuracy; next to a
  teacher, agreement with it and KL(teacher || student) per pixel.

  Args:
    label: the batch's entry with the labels.
    output: the output of both networks with the logits.
    ignore_label: the label of pixels that do not count (255 is common); negative labels never do.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.segmentation()
  >>> outputs = {"logits": jnp.array([[[2.0, 0.0], [1.0, 0.0]]])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([[0, 1]])}, None)
  >>> round(task.compute(sums)["miou"], 4)
  0.25
  """
  check_ignore_label(ignore_label)

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    logits, labels = outputs_of(outputs, output, "student"), batch_entry(batch, label)
    _check(logits)
    logits = logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))
    index, labeled, outside = class_labels(
      labels, logits.shape, where=batch.get("where"), entry=label, ignore_label=ignore_label
    )
    labeled &= ~outside
    pixels = jnp.ones_like(labeled)
    if "where" in batch:
      rows = batch["where"].reshape((-1,) + (1,) * (labels.ndim - 1))
      labeled, pixels = labeled & rows, pixels & rows
    predicted = logits.argmax(-1)
    statistics = {
      "confusion": confusion_matrix(index, predicted, labeled, logits.shape[-1]),
      OUTSIDE: count_outside(outside),
    }
    if teacher is None:
      return statistics
    teacher_logits = outputs_of(teacher, output, "teacher")
    return statistics | {
      "agreement": reduce.total(predicted == teacher_logits.argmax(-1), pixels),
      "teacher_kl": reduce.total(kl_divergence(logits, teacher_logits), pixels),
    }

  return Task(
    metrics=(
      Metric("miou", "mean IoU", "%", "max", ".2%"),
      Metric("dice", "mean Dice", "%", "max", ".2%"),
      Metric("pixel_accuracy", "pixel accuracy", "%", "max", ".2%"),
      AGREEMENT,
      TEACHER_KL,
    ),
    statistics=statistics,
    compute=_compute,
    label_classes=lambda outputs: {label: outputs_of(outputs, output, "student").shape[-1]},
    ignore_label=ignore_label,
    references=(),
  )


def _check(logits: jax.Array) -> None:
  if logits.ndim < 3:
    raise ValueError(
      f"'logits': expected [rows, ..., classes] on a grid, got {logits.shape}: use "
      "tasks.classification for one label per example"
    )
  if logits.shape[-1] == 1:
    raise ValueError(
      f"'logits': expected at least 2 classes, got {logits.shape}: give the model two per pixel"
    )


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  confusion = np.asarray(statistics["confusion"], np.float64)
  correct = confusion.diagonal()
  labeled, predicted = confusion.sum(1), confusion.sum(0)
  scores = means(statistics)
  if not confusion.any():
    return scores
  classes = (labeled + predicted > 0).sum()
  union = np.maximum(labeled + predicted - correct, 1)
  return scores | {
    "miou": float((correct / union).sum() / classes),
    "dice": float((2 * correct / np.maximum(labeled + predicted, 1)).sum() / classes),
    "pixel_accuracy": float(correct.sum() / confusion.sum()),
  }
