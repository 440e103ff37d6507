"""Defines the head of RetinaNet (Lin et al. 2017, arXiv:1708.02002)."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import boxes
from distill_jax.models.zoo.anchors import Level, anchor_boxes, decode, encode, pyramid_levels
from distill_jax.models.zoo.detection_head import DetectionHead
from distill_jax.models.zoo.true_boxes import match, matched, true_boxes
from distill_jax.types import Batch, Outputs

NO_VARIANCES = (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class RetinaNet(DetectionHead):
  """Anchors with a sigmoid for each class, trained by the focal loss.

  The loss of an image is 1 / max(N, 1) times the sum of the focal loss (equation 5) of all anchors
  and classes and the smooth L1 of the offsets of its N positive anchors (section 4). An anchor is
  positive if its IoU with the true box that overlaps it most is at least `positive_threshold`, or,
  as in the authors' code, if it is the one that overlaps this true box most. It is negative below
  `negative_threshold`. Between the two it does not count.

  Outputs that it reads: `class_logits` [B, A, classes]; `box_deltas` [B, A, 4]; the maps `p{k}` for
  their sizes.

  Attributes:
    anchor_size: side of the smallest square anchor of a level, in strides; 4 in the paper.
    octave_scales: factors of this side.
    ratios: heights over widths of the anchors.
    alpha: weight of the positive class in the focal loss.
    gamma: exponent of the focal loss.
    prior: probability of each class at the start of training.
    positive_threshold: least IoU of a positive anchor.
    negative_threshold: IoU below which an anchor is negative.
    beta: where the smooth L1 changes from quadratic to linear; 1/9 in the authors' code.

  Other attributes are those of `DetectionHead`.

  >>> RetinaNet(10).anchors_per_position
  9
  """

  _: dataclasses.KW_ONLY
  anchor_size: float = 4.0
  octave_scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
  ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
  alpha: float = 0.25
  gamma: float = 2.0
  prior: float = 0.01
  positive_threshold: float = 0.5
  negative_threshold: float = 0.4
  beta: float = 1 / 9

  @property
  def anchors_per_position(self) -> int:
    return len(self.octave_scales) * len(self.ratios)

  @property
  def output_shapes(self) -> dict[str, tuple[int, ...]]:
    return {"class_logits": (self.classes,), "box_deltas": (4,)}

  @property
  def class_bias(self) -> float:
    return -math.log((1 - self.prior) / self.prior)

  def anchors(self, levels: tuple[Level, ...]) -> np.ndarray:
    """Returns the anchors [A, 4] (xyxy), float64, in pixels."""
    pairs = itertools.product(self.octave_scales, self.ratios)
    sides = np.array([(scale / ratio**0.5, scale * ratio**0.5) for scale, ratio in pairs])
    return anchor_boxes(levels, [self.anchor_size * level.stride * sides for level in levels])

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
    is_positive = pairs.is_best | (pairs.overlaps >= self.positive_threshold)
    counts = is_positive | (pairs.overlaps < self.negative_threshold)
    its_boxes, its_labels = matched(truth, pairs.rows)
    # Any box with an area keeps log(0) out of the gradient.
    its_boxes = jnp.where(is_positive[..., None], its_boxes, anchors)
    target = jax.nn.one_hot(jnp.where(is_positive, its_labels, -1), self.classes)
    focal = focal_loss(logits, target, self.alpha, self.gamma).sum(-1)
    # The smooth L1 is Huber's loss over its delta.
    errors = optax.huber_loss(deltas, encode(its_boxes, anchors, NO_VARIANCES), delta=self.beta)
    location = errors.sum(-1) / self.beta
    total = jnp.where(counts, focal, 0).sum(-1) + jnp.where(is_positive, location, 0).sum(-1)
    return total / jnp.maximum(is_positive.sum(-1), 1)

  def decode(self, outputs: Outputs) -> boxes.Detections:
    """Returns the detections of the images; a score is a sigmoid's probability."""
    levels = pyramid_levels(outputs)
    scores = jax.nn.sigmoid(self.read(outputs, "class_logits", levels))
    deltas = self.read(outputs, "box_deltas", levels)
    anchors = jnp.asarray(self.anchors(levels), deltas.dtype)
    return self.suppress(decode(deltas, anchors, NO_VARIANCES), scores, levels)


def focal_loss(logits: jax.Array, target: jax.Array, alpha: float, gamma: float) -> jax.Array:
  """Returns -alpha_t (1 - p_t)^gamma log p_t (equation 5) of logits and targets 0 or 1 [...].

  Both factors come from one logarithm: optax's power takes most of a step on a CPU.

  >>> focal_loss(jnp.array([2.0, -1.0]), jnp.array([1.0, 0.0]), 0.25, 2.0).round(4)
  Array([0.0005, 0.017 ], dtype=float32)
  """
  # p_t = sigmoid(signed), and 1 - p_t = sigmoid(-signed).
  signed = logits * (2 * target - 1)
  log_p = jax.nn.log_sigmoid(signed)
  weights = alpha * target + (1 - alpha) * (1 - target)
  return -weights * jnp.exp(gamma * (log_p - signed)) * log_p
