"""Semantic segmentation: one class per pixel or voxel."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.tasks.logits import AGREEMENT, TEACHER_KL, confusion_matrix, means
from distill_jax.types import Batch, Metric, Outputs, Task


def segmentation(*, ignore_label: int = -1, label: str = "label", output: str = "logits") -> Task:
  """Returns the task of logits [B, ..., C] and integer labels [B, ...] on the same grid.

  Its metrics come from one running confusion matrix [C, C]: mean intersection over union and mean
  Dice coefficient over the classes that occur as label or prediction, and pixel accuracy; next to a
  teacher, agreement with it and KL(teacher || student) per pixel.

  Args:
    ignore_label: the label of pixels that do not count (255 and -1 are common); negative labels
      never do.
    label: the batch's entry with the labels.
    output: the output of both networks with the logits.
  """

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    logits, labels = outputs_of(outputs, output, "student"), batch_entry(batch, label)
    _check(logits, labels, label)
    logits = logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))
    labeled = (labels >= 0) & (labels != ignore_label)
    pixels = jnp.ones_like(labeled)
    if "where" in batch:
      rows = batch["where"].reshape((-1,) + (1,) * (labels.ndim - 1))
      labeled, pixels = labeled & rows, pixels & rows
    predicted = logits.argmax(-1)
    confusion = confusion_matrix(labels, predicted, labeled, logits.shape[-1])
    if teacher is None:
      return {"confusion": confusion}
    teacher_logits = teacher[output]
    return {
      "confusion": confusion,
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
    num_classes=lambda outputs: outputs[output].shape[-1],
    references=(),
  )


def _check(logits, labels, name: str) -> None:
  if logits.ndim < 3:
    raise ValueError(
      f"'logits': expected [rows, ..., classes] on a grid, got {logits.shape}: use "
      "tasks.classification for one label per example"
    )
  if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"{name!r}: expected integers {logits.shape[:-1]}, one per pixel of the logits, got "
      f"{labels.dtype} {labels.shape}: resize one of them in the model"
    )


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  confusion = np.asarray(statistics["confusion"], np.float64)
  correct = confusion.diagonal()
  labeled, predicted = confusion.sum(1), confusion.sum(0)
  occurs = labeled + predicted > 0
  classes = max(occurs.sum(), 1)
  union = np.maximum(labeled + predicted - correct, 1)
  return means(dict(statistics)) | {
    "miou": float((correct / union).sum() / classes),
    "dice": float((2 * correct / np.maximum(labeled + predicted, 1)).sum() / classes),
    "pixel_accuracy": float(correct.sum() / max(confusion.sum(), 1)),
  }
