"""Selects the boxes of a batch that train a detector, and matches them with anchors."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import boxes, reduce
from distill_jax.models.zoo.anchors import Level, image_size
from distill_jax.types import Batch


class TrueBoxes(NamedTuple):
  """The boxes that train, padded.

  Attributes:
    boxes: [B, N, 4] (xyxy) in pixels, clipped to the image; zeros where a box does not count.
    label: int32 [B, N]; 0 where a box does not count.
    counts: bool [B, N].
  """

  boxes: jax.Array
  label: jax.Array
  counts: jax.Array


class Match(NamedTuple):
  """The true box of each anchor.

  Attributes:
    rows: int32 [B, A], its row.
    overlaps: [B, A], IoU of anchor and box; 0 in an image without boxes.
    is_best: bool [B, A], whether the anchor has the box because no other overlaps it more.
  """

  rows: jax.Array
  overlaps: jax.Array
  is_best: jax.Array


def true_boxes(batch: Batch, levels: Sequence[Level]) -> TrueBoxes:
  """Returns the boxes of a batch that count.

  A box counts if its label is not negative, it is no crowd, and it has an area inside of the image;
  NaN has none.

  Args:
    batch: `boxes` [B, N, 4] (xyxy) in pixels, `label` int [B, N], and `crowd` bool [B, N] if some
      boxes are around several objects.
    levels: levels of the pyramid, which give the image's size.

  Raises:
    ValueError: labels or crowds of another shape than [B, N].
  """
  label = jnp.asarray(batch["label"])
  crowd = jnp.asarray(batch.get("crowd", jnp.zeros(label.shape, bool)))
  clipped = boxes.clip(batch["boxes"], *image_size(levels))
  clipped = clipped.astype(reduce.common_dtype(clipped.dtype, jnp.float32))
  for name, array in (("label", label), ("crowd", crowd)):
    if array.shape != clipped.shape[:-1] or array.ndim != 2:
      raise ValueError(
        f"{name}: expected [B, N] with boxes [B, N, 4], got {array.shape} with {clipped.shape}: "
        "give one number for each box"
      )
  counts = (label >= 0) & ~crowd & boxes.has_area(clipped)
  truth = TrueBoxes(
    jnp.where(counts[..., None], clipped, 0), jnp.where(counts, label, 0).astype(jnp.int32), counts
  )
  # A batch of no boxes at all has one row of padding, which `argmax` needs.
  return jax.tree.map(_pad_row, truth) if not label.shape[1] else truth


def match(anchors: jax.Array, truth: TrueBoxes) -> Match:
  """Returns for each anchor [A, 4] the true box that overlaps it most.

  The anchor that overlaps a box most has this box. Where it is so for several boxes, it has the one
  with the largest IoU.
  """
  overlaps = boxes.iou(truth.boxes[:, :, None], anchors)  # [B, N, A]
  best_anchors = overlaps.argmax(-1, keepdims=True)
  is_best = (jnp.arange(len(anchors)) == best_anchors) & (overlaps > 0)
  has_best = is_best.any(1)
  best_rows = jnp.where(is_best, overlaps, 0).argmax(1)
  rows = jnp.where(has_best, best_rows, overlaps.argmax(1))
  return Match(rows, jnp.take_along_axis(overlaps, rows[:, None], 1)[:, 0], has_best)


def matched(truth: TrueBoxes, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the boxes [B, A, 4] and labels [B, A] of the rows [B, A]."""
  matched_boxes = jnp.take_along_axis(truth.boxes, rows[..., None], 1)
  return matched_boxes, jnp.take_along_axis(truth.label, rows, 1)


def _pad_row(x: jax.Array) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2)))
