"""Turns a detector's boxes and scores into detections without duplicates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.boxes.formats import as_boxes, has_area
from distill_jax.boxes.overlaps import iou
from distill_jax.errors import check_integer

SCORE_TOLERANCE = 1e-2
"""How far scores may be outside of 0 to 1: those of bfloat16 are rounded."""


class Detections(NamedTuple):
  """What a detector finds in each image, in order of falling scores; padding is at the end.

  Example in `detect`.

  Attributes:
    boxes: [B, K, 4] (left, top, right, bottom) in pixels; zeros for padding.
    scores: [B, K], from 0 to 1; 0 for padding.
    classes: int32 [B, K], class numbers from 0; -1 for padding.
  """

  boxes: jax.Array
  scores: jax.Array
  classes: jax.Array


def detect(
  boxes: ArrayLike,
  scores: ArrayLike,
  *,
  iou_threshold: float = 0.6,
  score_threshold: float = 0.05,
  candidates: int = 200,
  max_detections: int = 100,
) -> Detections:
  """Returns the best boxes of each image after non-maximum suppression within each class.

  In order of falling scores, a box is kept unless its IoU with a kept box of its class exceeds
  `iou_threshold`. One box may be kept for several classes. Shapes are fixed, so that it runs under
  `jit`. Of equal scores the first one counts as higher.

  Args:
    boxes: [B, A, 4] (xyxy) in pixels. Those without area or with NaN are left out.
    scores: [B, A, C], from 0 to 1, of each class without background. NaN counts as 0. Where an
      image has negative ones, such as logits, the lowest is in its last row, as class 0 without an
      area, so that `tasks.detection` names it.
    iou_threshold: IoU above which the lower of two scores is suppressed.
    score_threshold: scores at or below it are left out; >= 0.
    candidates: number of pairs of box and class with the highest scores per image that are
      compared with each other.
    max_detections: K, the number of detections per image.

  Returns:
    `Detections` with K rows per image.

  Raises:
    ValueError: shapes that do not fit together, a threshold outside of 0 to 1, or a number < 1.

  >>> boxes = jnp.array([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 9.0, 9.0]]])
  >>> scores = jnp.array([[[0.9, 0.0], [0.8, 0.0], [0.2, 0.7]]])
  >>> detections = detect(boxes, scores, max_detections=4)
  >>> detections.classes
  Array([[ 0,  1,  0, -1]], dtype=int32)
  >>> detections.boxes[0, 1]
  Array([5., 5., 9., 9.], dtype=float32)
  """
  boxes = as_boxes("boxes", boxes)
  scores = jnp.asarray(scores)
  if boxes.ndim != 3 or scores.ndim != 3 or scores.shape[:2] != boxes.shape[:2]:
    raise ValueError(
      f"scores: expected [B, A, C] with boxes [B, A, 4], got {scores.shape} with {boxes.shape}: "
      "give one row of scores for each box"
    )
  for name, value in (("iou_threshold", iou_threshold), ("score_threshold", score_threshold)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
  check_integer("candidates", candidates, 1)
  check_integer("max_detections", max_detections, 1)
  scores = scores.astype(reduce.common_dtype(scores.dtype, jnp.float32))
  lowest = jnp.where(scores < 0, scores, 0).min((1, 2))
  # NaN exceeds no threshold.
  is_candidate = (scores > score_threshold) & has_area(boxes)[..., None]
  scores = jnp.where(is_candidate, scores, 0)
  best = jax.vmap(lambda b, s: _best(b, s, candidates))(boxes, scores)
  suppressed = jax.vmap(lambda d: _suppressed(d, iou_threshold))(best)
  found = jax.vmap(lambda d, s: _first(d, s, max_detections))(best, suppressed)
  return jax.vmap(_mark_negative)(found, lowest)


def _best(boxes: jax.Array, scores: jax.Array, count: int) -> Detections:
  """Returns the `count` best pairs of box and class of an image."""
  # The best pairs are among the boxes with the best scores, of which there are fewer. In their
  # first order, equal scores rank as in the full array.
  number = min(count, scores.shape[0])
  positions = jnp.sort(jax.lax.top_k(scores.max(-1), number)[1])
  values, pairs = jax.lax.top_k(scores[positions].ravel(), min(count, number * scores.shape[1]))
  classes = jnp.where(values > 0, pairs % scores.shape[1], -1)
  best_boxes = boxes[positions[pairs // scores.shape[1]]]
  best_boxes = jnp.where(values[:, None] > 0, best_boxes, 0)
  return Detections(best_boxes, values, classes.astype(jnp.int32))


def _suppressed(detections: Detections, iou_threshold: float) -> jax.Array:
  """Returns which detections of an image, sorted by score, greedy suppression removes.

  It repeats `a box is suppressed by an earlier box that is not` until nothing changes, which ends
  with the result of the greedy loop (Zheng et al. 2021, Cluster-NMS, proposition 1,
  arXiv:2005.03572), mostly after 3 to 5 rounds instead of one step per box.
  """
  boxes, scores, classes = detections
  overlaps = iou(boxes[:, None], boxes[None]) > iou_threshold
  is_rival = overlaps & (classes[:, None] == classes[None])
  # Row i is suppressed by columns j < i.
  is_rival &= jnp.tri(len(boxes), k=-1, dtype=bool)
  start = jnp.zeros(scores.shape, bool)

  def repeat(state):
    _, suppressed = state
    return suppressed, (is_rival & ~suppressed[None]).any(1)

  def changes(state):
    previous, suppressed = state
    return (previous != suppressed).any()

  return jax.lax.while_loop(changes, repeat, (start, is_rival.any(1)))[1]


def _first(detections: Detections, suppressed: jax.Array, count: int) -> Detections:
  """Returns the first `count` detections that are not suppressed, and padding."""
  scores = jnp.where(suppressed, 0, detections.scores)
  missing = max(0, count - len(scores))
  values, rows = jax.lax.top_k(scores, min(count, len(scores)))
  boxes = jnp.where(values[:, None] > 0, detections.boxes[rows], 0)
  classes = jnp.where(values > 0, detections.classes[rows], -1)
  return Detections(
    jnp.pad(boxes, ((0, missing), (0, 0))),
    jnp.pad(values, (0, missing)),
    jnp.pad(classes, (0, missing), constant_values=-1),
  )


def _mark_negative(detections: Detections, lowest: jax.Array) -> Detections:
  """Returns the detections of an image with its lowest score in the last row, if it is negative."""
  boxes, scores, classes = detections
  is_negative = lowest < -SCORE_TOLERANCE
  return Detections(
    boxes.at[-1].set(jnp.where(is_negative, 0, boxes[-1])),
    scores.at[-1].set(jnp.where(is_negative, lowest, scores[-1])),
    classes.at[-1].set(jnp.where(is_negative, 0, classes[-1])),
  )
