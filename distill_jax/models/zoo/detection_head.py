"""Defines what a detector's head says of itself, and the end of all decoders."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from distill_jax import boxes, reduce
from distill_jax.errors import check_integer
from distill_jax.models.zoo.anchors import Level, image_size
from distill_jax.types import Batch, Outputs


@dataclasses.dataclass(frozen=True)
class DetectionHead(abc.ABC):
  """The numbers of a head, with its loss and its decoder, which are pure functions.

  Attributes:
    classes: C, number of classes without background.
    iou_threshold: IoU above which the lower of two scores is suppressed.
    score_threshold: scores at or below it are no detections.
    candidates: number of pairs of box and class per image that suppression compares.
    max_detections: K, number of detections per image.

  Raises:
    ValueError: `classes` is no integer >= 1.
  """

  classes: int
  _: dataclasses.KW_ONLY
  iou_threshold: float = 0.5
  score_threshold: float = 0.05
  candidates: int = 200
  max_detections: int = 100

  def __post_init__(self):
    check_integer("classes", self.classes, 1)

  @property
  @abc.abstractmethod
  def anchors_per_position(self) -> int:
    """Number of anchors at each position of a level."""

  @property
  @abc.abstractmethod
  def output_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of an anchor's outputs: 'class_logits', and the one that gives its box."""

  @property
  def class_bias(self) -> float:
    """Initial bias of the class logits."""
    return 0.0

  @abc.abstractmethod
  def loss(self, outputs: Outputs, batch: Batch) -> jax.Array:
    """Returns the losses [B] of the images, each over its own positives."""

  @abc.abstractmethod
  def decode(self, outputs: Outputs) -> boxes.Detections:
    """Returns the detections of the images."""

  def read(self, outputs: Outputs, name: str, levels: tuple[Level, ...]) -> jax.Array:
    """Returns an output [B, A, ...] in float32 or wider.

    Raises:
      ValueError: another shape than that of the pyramid's anchors.
    """
    count = self.anchors_per_position * sum(level.height * level.width for level in levels)
    expected = (count, *self.output_shapes[name])
    x = jnp.asarray(outputs[name])
    if x.shape[1:] != expected:
      raise ValueError(
        f"{name}: expected [B, {', '.join(map(str, expected))}] of the levels "
        f"{[tuple(level) for level in levels]}, got {x.shape}: build the network with this head"
      )
    return x.astype(reduce.common_dtype(x.dtype, jnp.float32))

  def suppress(
    self, predicted: jax.Array, scores: jax.Array, levels: tuple[Level, ...]
  ) -> boxes.Detections:
    """Returns the detections of boxes [B, A, 4], clipped to the image, and scores [B, A, C]."""
    return boxes.detect(
      boxes.clip(predicted, *image_size(levels)),
      scores,
      iou_threshold=self.iou_threshold,
      score_threshold=self.score_threshold,
      candidates=self.candidates,
      max_detections=self.max_detections,
    )
