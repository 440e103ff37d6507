"""Compares logits and labels pixel by pixel."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.losses import resize_logits
from distill_jax.objectives.calls import outputs_of
from distill_jax.objectives.class_labels import class_labels
from distill_jax.tasks.logits import confusion_matrix
from distill_jax.types import Outputs


def logits_of(outputs: Outputs, output: str, labels: jax.Array, names: Sequence[str]) -> jax.Array:
  """Returns the student's logits [B, ..., C], C >= 2, on the labels' grid, in float32 or wider."""
  logits = outputs_of(outputs, output, "student")
  if logits.ndim < 3:
    raise ValueError(
      f"{output!r}: expected [rows, ..., classes] on a grid, got {logits.shape}: use "
      "tasks.classification for one label per example"
    )
  classes = num_classes(logits.shape)
  if names and len(names) != classes:
    raise ValueError(
      f"class_names: expected {classes} names, one per class of the logits {logits.shape}, got "
      f"{len(names)}: name class 0, the background, too"
    )
  logits = on_grid(logits, labels, "student")
  return logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))


def on_grid(logits: jax.Array, labels: jax.Array, side: str) -> jax.Array:
  """Returns logits [B, ..., C] resized to the grid of labels [B, ...], of as many axes.

  One logit per pixel becomes two, of which the first is 0: softmax is then its sigmoid.
  """
  if logits.shape[-1] == 1:
    logits = jnp.concatenate([jnp.zeros_like(logits), logits], -1)
  if labels.ndim != logits.ndim - 1:
    return logits
  return resize_logits(logits, labels.shape[1:], name=f"{side}'s logits")


def num_classes(shape: Sequence[int]) -> int:
  """Returns the number of classes of logits of a shape; one logit per pixel has two."""
  return max(shape[-1], 2)


class Pixels(NamedTuple):
  """Pixels [B, ...]: class numbers of label and prediction, and which have a label that counts.

  Attributes:
    outside: labels that are no class.
    is_nan: whether a logit is NaN; `argmax` gives the position of the first.
  """

  label: jax.Array
  predicted: jax.Array
  labeled: jax.Array
  outside: jax.Array
  is_nan: jax.Array


def pixels_of(
  logits: jax.Array,
  labels: jax.Array,
  where: jax.Array | None,
  entry: str,
  ignore_label: int | None,
) -> Pixels:
  number, labeled, outside = class_labels(
    labels, logits.shape, where=where, entry=entry, ignore_label=ignore_label
  )
  labeled &= ~outside
  if where is not None:
    labeled &= where.reshape((-1,) + (1,) * (labeled.ndim - 1))
  predicted = logits.argmax(-1)
  is_nan = jnp.isnan(jnp.take_along_axis(logits, predicted[..., None], -1)[..., 0])
  return Pixels(number, predicted, labeled, outside, is_nan)


def example_iou(pixels: Pixels, classes: int, include_background: bool) -> jax.Array:
  """Returns the mean IoU [B] of each example over the classes that occur in it; NaN without any."""
  count = functools.partial(confusion_matrix, classes=classes)
  counts = jax.vmap(count)(*pixels[:3])
  correct = counts.diagonal(axis1=1, axis2=2)
  sizes = counts.sum(1, dtype=counts.dtype) + counts.sum(2, dtype=counts.dtype)
  occurs = (sizes > 0) & (include_background | (jnp.arange(classes) > 0))[None]
  iou = jnp.where(occurs, correct / jnp.maximum(sizes - correct, 1), 0)
  return iou.sum(-1) / occurs.sum(-1, dtype=iou.dtype)
