"""Assigns true boxes to positions by how well class and box agree (TOOD, Feng et al. 2021)."""

import jax
import jax.numpy as jnp

from distill_jax import boxes, reduce
from distill_jax.models.zoo.true_boxes import TrueBoxes


def align(
  probabilities: jax.Array,
  predicted: jax.Array,
  centers: jax.Array,
  truth: TrueBoxes,
  *,
  count: int,
  alpha: float,
  beta: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the true box of each position and its target score.

  The alignment of a position and a true box is t = s^alpha u^beta, of the probability s of the
  box's class and the overlap u with the predicted box (section 3.2, arXiv:2108.07755); u is CIoU,
  or 0 if that is negative, as in Ultralytics. Of the positions whose center is inside of a box, the
  `count` best aligned ones are its positives. A position of several boxes has the one with the
  largest u. The target score is t, scaled so that its maximum over a box's positions is that of u;
  it is 0 for all other positions.

  A box without a center inside has no positive.

  Args:
    probabilities: [B, P, C].
    predicted: boxes [B, P, 4] (xyxy) in pixels.
    centers: of the positions, [P, 2] in pixels.
    truth: the boxes that count.
    count: number of positions that a box may have, at most.
    alpha: exponent of the probability.
    beta: exponent of the overlap.

  Returns:
    rows: int32 [B, P], the row of the true box.
    scores: [B, P], the target scores, from 0 to 1.
  """
  is_inside = _contains(truth.boxes, centers)
  overlaps = boxes.ciou(truth.boxes[:, :, None], predicted[:, None])
  overlaps = jnp.where(is_inside, jnp.maximum(overlaps, 0), 0)
  index = truth.label[..., None].astype(jnp.int32)
  its_probabilities = jnp.take_along_axis(probabilities.swapaxes(1, 2), index, 1)
  alignment = its_probabilities**alpha * overlaps**beta
  is_positive = _largest(jnp.where(is_inside, alignment, -1), count) & is_inside
  # A position has one box.
  rows = jnp.where(is_positive, overlaps, -1).argmax(1)
  is_positive &= jnp.arange(overlaps.shape[1])[:, None] == rows[:, None]
  alignment = jnp.where(is_positive, alignment, 0)
  best_overlaps = jnp.where(is_positive, overlaps, 0).max(-1, keepdims=True)
  best_alignments = alignment.max(-1, keepdims=True)
  scale = reduce.value((best_overlaps, best_alignments))
  return rows, (alignment * scale).sum(1)


def _contains(its_boxes: jax.Array, centers: jax.Array) -> jax.Array:
  """Returns whether centers [P, 2] are inside of boxes [B, N, 4], bool [B, N, P]."""
  first = centers > its_boxes[:, :, None, :2]
  second = centers < its_boxes[:, :, None, 2:]
  return (first & second).all(-1)


def _largest(x: jax.Array, count: int) -> jax.Array:
  """Returns whether each number of [B, N, P] is one of the `count` largest of its row."""
  rows = x.reshape(-1, x.shape[-1])
  indices = jax.lax.top_k(rows, min(count, x.shape[-1]))[1]
  is_largest = jnp.put_along_axis(jnp.zeros(rows.shape, bool), indices, True, 1, inplace=False)
  return is_largest.reshape(x.shape)
