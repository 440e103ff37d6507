"""Defines the head of YOLO in its anchor-free form, as in Ultralytics' YOLOv8."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from distill_jax import boxes
from distill_jax.errors import check_integer
from distill_jax.models.zoo.anchors import positions, pyramid_levels
from distill_jax.models.zoo.detection_head import DetectionHead
from distill_jax.models.zoo.task_alignment import align
from distill_jax.models.zoo.true_boxes import matched, true_boxes
from distill_jax.types import Batch, Outputs

# A distance at the last bin has no bin on its other side.
LAST_BIN_MARGIN = 0.01


@dataclasses.dataclass(frozen=True)
class YOLO(DetectionHead):
  """A sigmoid for each class at each position, and distributions of the distances to four edges.

  The loss of an image is 1 / max(T, 1) times the weighted sum of
  - `class_weight`: the binary cross entropy of all positions and classes with the target scores;
  - `box_weight`: 1 - CIoU of the positive positions, each weighted by its target score;
  - `bins_weight`: their distribution focal loss, the mean over the edges, weighted likewise.
  T is the sum of the target scores, which `task_alignment.align` computes.

  A distance, in strides, is the mean of its distribution over the bins 0 .. R - 1. The distribution
  focal loss is the cross entropy of the two bins around the true distance, weighted by how near
  they are (Generalized Focal Loss, Li et al. 2020, equation 6, arXiv:2006.04388).

  Outputs that it reads: `class_logits` [B, A, classes]; `box_bins` [B, A, 4, R], logits of the
  distances from the position to the left, top, right and bottom edge; the maps `p{k}` for their
  sizes.

  Attributes:
    bins: R, number of bins of a distance; R - 1 strides are the largest one.
    positions_per_box: number of positions that a true box may have, at most.
    alpha: exponent of the predicted probability in the alignment.
    beta: exponent of the overlap in the alignment.
    box_weight: weight of 1 - CIoU.
    class_weight: weight of the binary cross entropy.
    bins_weight: weight of the distribution focal loss.
    prior: probability of each class at the start of training.

  Other attributes are those of `DetectionHead`.

  >>> YOLO(10).output_shapes
  {'class_logits': (10,), 'box_bins': (4, 16)}
  """

  _: dataclasses.KW_ONLY
  bins: int = 16
  positions_per_box: int = 10
  alpha: float = 0.5
  beta: float = 6.0
  box_weight: float = 7.5
  class_weight: float = 0.5
  bins_weight: float = 1.5
  prior: float = 0.01
  iou_threshold: float = 0.6

  def __post_init__(self):
    super().__post_init__()
    check_integer("bins", self.bins, 2)
    check_integer("positions_per_box", self.positions_per_box, 1)

  @property
  def anchors_per_position(self) -> int:
    return 1

  @property
  def output_shapes(self) -> dict[str, tuple[int, ...]]:
    return {"class_logits": (self.classes,), "box_bins": (4, self.bins)}

  @property
  def class_bias(self) -> float:
    return -math.log((1 - self.prior) / self.prior)

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
    bins = self.read(outputs, "box_bins", levels)
    centers, strides = map(jnp.asarray, positions(levels))
    predicted = predicted_boxes(bins, centers, strides)
    truth = true_boxes(batch, levels)
    rows, scores = align(
      jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
      jax.lax.stop_gradient(predicted),
      centers,
      truth,
      count=self.positions_per_box,
      alpha=self.alpha,
      beta=self.beta,
    )
    its_boxes, its_labels = matched(truth, rows)
    target = jax.nn.one_hot(its_labels, self.classes) * scores[..., None]
    entropy = optax.sigmoid_binary_cross_entropy(logits, target).sum((1, 2))
    overlap = ((1 - boxes.ciou(predicted, its_boxes)) * scores).sum(1)
    distances = edge_distances(its_boxes, centers) / strides[:, None]
    bin_losses = distribution_focal_loss(bins, distances).mean(-1)
    distribution = (bin_losses * scores).sum(1)
    total = (
      self.class_weight * entropy + self.box_weight * overlap + self.bins_weight * distribution
    )
    return total / jnp.maximum(scores.sum(1), 1)

  def decode(self, outputs: Outputs) -> boxes.Detections:
    """Returns the detections of the images; a score is a sigmoid's probability."""
    levels = pyramid_levels(outputs)
    scores = jax.nn.sigmoid(self.read(outputs, "class_logits", levels))
    bins = self.read(outputs, "box_bins", levels)
    centers, strides = map(jnp.asarray, positions(levels))
    return self.suppress(predicted_boxes(bins, centers, strides), scores, levels)


def predicted_boxes(bins: jax.Array, centers: jax.Array, strides: jax.Array) -> jax.Array:
  """Returns boxes [B, P, 4] (xyxy) in pixels of logits [B, P, 4, R] at the centers [P, 2].

  >>> bins = jnp.log(jnp.array([[[[0.5, 0.5]] * 4]]))
  >>> predicted_boxes(bins, np.array([[4.0, 4.0]]), np.array([8.0]))
  Array([[[0., 0., 8., 8.]]], dtype=float32)
  """
  numbers = jnp.arange(bins.shape[-1], dtype=bins.dtype)
  distances = (jax.nn.softmax(bins) * numbers).sum(-1) * strides[:, None]
  return jnp.concatenate([centers - distances[..., :2], centers + distances[..., 2:]], -1)


def edge_distances(its_boxes: jax.Array, centers: jax.Array) -> jax.Array:
  """Returns distances [..., P, 4] in pixels from centers [P, 2] to the edges of boxes [..., P, 4];
  negative where a center is outside."""
  return jnp.concatenate([centers - its_boxes[..., :2], its_boxes[..., 2:] - centers], -1)


def distribution_focal_loss(logits: jax.Array, distances: jax.Array) -> jax.Array:
  """Returns -((k + 1 - d) log p_k + (d - k) log p_{k+1}) for the bins k <= d < k + 1.

  Args:
    logits: [..., R].
    distances: d [...], in bins; those outside of 0 .. R - 1 count as the nearest inside.

  Returns:
    Nats [...].

  >>> distribution_focal_loss(jnp.zeros(4), jnp.array(1.25)).round(3)
  Array(1.386, dtype=float32)
  """
  count = logits.shape[-1]
  distances = jnp.clip(distances, 0, count - 1 - LAST_BIN_MARGIN)
  # The weights of the two bins: a hat of width 2 around the distance.
  numbers = jnp.arange(count, dtype=distances.dtype)
  weights = jnp.maximum(1 - jnp.abs(distances[..., None] - numbers), 0)
  return -(weights * jax.nn.log_softmax(logits)).sum(-1)
