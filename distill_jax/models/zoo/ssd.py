"""Defines the head of SSD (Liu et al. 2016, arXiv:1512.02325)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import boxes
from distill_jax.models.zoo.anchors import (
  Level,
  anchor_boxes,
  decode,
  encode,
  image_size,
  pyramid_levels,
)
from distill_jax.models.zoo.detection_head import DetectionHead
from distill_jax.models.zoo.true_boxes import match, matched, true_boxes
from distill_jax.types import Batch, Outputs


@dataclasses.dataclass(frozen=True)
class SSD(DetectionHead):
  """Default boxes with a softmax over classes and background, and hard negative mining.

  The loss of an image is 1/N (L_conf + L_loc), equation 1 with alpha = 1, and 0 where no default
  box is matched (N = 0). L_loc is the smooth L1 of the offsets of matched boxes (equation 2), which
  are divided by the variances of published code. L_conf is the cross entropy (equation 3) of the
  matched ones and of the `negatives_per_positive` N others whose cross entropy is largest.

  A default box is matched with the true box that overlaps it most if its IoU exceeds
  `match_threshold`, or if it is the one that overlaps this true box most (section 2.2).

  Outputs that it reads: `class_logits` [B, A, classes + 1], background last; `box_deltas` [B, A,
  4]; the maps `p{k}` for their sizes.

  Attributes:
    ratios: widths over heights of the default boxes; the paper's levels have these or in addition
      3 and 1/3. Each level has one more square, of the geometric mean of its scale and the next.
    scale_range: scales of the first and the last level, as fractions of the image's shorter side;
      the others are spaced evenly (equation 4).
    match_threshold: IoU above which a default box is matched.
    negatives_per_positive: number of negatives that count for each match, at most.
    variances: divisors of the offsets of centers and of the logarithms of sides.

  Other attributes are those of `DetectionHead`.

  >>> head = SSD(10)
  >>> head.output_shapes
  {'class_logits': (11,), 'box_deltas': (4,)}
  """

  _: dataclasses.KW_ONLY
  ratios: tuple[float, ...] = (1.0, 2.0, 0.5)
  scale_range: tuple[float, float] = (0.2, 0.9)
  match_threshold: float = 0.5
  negatives_per_positive: int = 3
  variances: tuple[float, float] = (0.1, 0.2)
  iou_threshold: float = 0.45

  @property
  def anchors_per_position(self) -> int:
    return len(self.ratios) + 1

  @property
  def output_shapes(self) -> dict[str, tuple[int, ...]]:
    return {"class_logits": (self.classes + 1,), "box_deltas": (4,)}

  def anchors(self, levels: tuple[Level, ...]) -> np.ndarray:
    """Returns the default boxes [A, 4] (xyxy), float64, in pixels."""
    first, last = self.scale_range
    step = (last - first) / max(len(levels) - 1, 1)
    scales = first + step * np.arange(len(levels) + 1)
    side = min(image_size(levels))
    roots = np.sqrt([*self.ratios, 1.0])
    sides = []
    for scale, following in zip(scales, scales[1:]):
      sizes = side * np.array([scale] * len(self.ratios) + [np.sqrt(scale * following)])
      sides.append(np.stack([sizes * roots, sizes / roots], -1))
    return anchor_boxes(levels, sides)

  def loss(self, outputs: Outputs, batch: Batch) -> jax.Array:
    """Returns the losses [B] of the images.

    Args:
      outputs: see the class.
      batch: `boxes`, `label` and maybe `crowd`, as in `true_boxes`.

    Raises:
      ValueError: outputs or entries of another shape.
    """
    levels = pyramid_levels(outputs)
    logits = self.read(outputs, "class_logits", levels)
    deltas = self.read(outputs, "box_deltas", levels)
    anchors = jnp.asarray(self.anchors(levels), deltas.dtype)
    truth = true_boxes(batch, levels)
    pairs = match(anchors, truth)
    is_match = pairs.is_best | (pairs.overlaps > self.match_threshold)
    its_boxes, its_labels = matched(truth, pairs.rows)
    # Any box with an area keeps log(0) out of the gradient.
    its_boxes = jnp.where(is_match[..., None], its_boxes, anchors)
    errors = optax.huber_loss(deltas, encode(its_boxes, anchors, self.variances), delta=1.0)
    location = jnp.where(is_match, errors.sum(-1), 0).sum(-1)
    target = jnp.where(is_match, its_labels, self.classes)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    count = is_match.sum(-1)
    positive = jnp.where(is_match, entropy, 0).sum(-1)
    # The sum of the largest does not depend on the order of equal ones.
    negatives = -jnp.sort(-jnp.where(is_match, 0, entropy))
    is_hard = jnp.arange(negatives.shape[1]) < self.negatives_per_positive * count[:, None]
    negative = jnp.where(is_hard, negatives, 0).sum(-1)
    return (positive + negative + location) / jnp.maximum(count, 1)

  def decode(self, outputs: Outputs) -> boxes.Detections:
    """Returns the detections of the images; a score is a softmax's probability."""
    levels = pyramid_levels(outputs)
    scores = jax.nn.softmax(self.read(outputs, "class_logits", levels))[..., :-1]
    deltas = self.read(outputs, "box_deltas", levels)
    anchors = jnp.asarray(self.anchors(levels), deltas.dtype)
    return self.suppress(decode(deltas, anchors, self.variances), scores, levels)
