"""Defines a small detector: a backbone, a feature pyramid, and towers that a head reads."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import check_integer
from distill_jax.models.zoo.cnn import check_images
from distill_jax.models.zoo.detection_head import DetectionHead
from distill_jax.models.zoo.lraspp import ConvNorm
from distill_jax.types import Outputs

GROUP_SIZE = 8


class Detector(nnx.Module):
  """A residual backbone, whose levels have half the resolution of the one before, a feature pyramid
  (Lin et al. 2017, arXiv:1612.03144), and two towers of convolutions that all levels share.

  One tower gives the classes, the other the boxes, as in RetinaNet. The levels of the pyramid have
  different statistics, so that the towers normalize each map by groups of channels.

      head = YOLO(classes=10)
      student = Detector(3, (8, 16, 32, 64), head, neck_width=16, rngs=rngs)
      head.loss(student(images), batch)  # [B]
      head.decode(student(images))  # boxes.Detections

  Sides of the images are multiples of 2^n for n widths.

  Outputs of images [B, H, W, channels], with k = 1 .. n for `c{k}` and 2 .. n for `p{k}`:
    c{k}: [B, H / 2^k, W / 2^k, widths[k - 1]]: the backbone's levels, after the last ReLU.
    p{k}: [B, H / 2^k, W / 2^k, neck_width]: the pyramid's levels, not rectified.
    class_logits: [B, A, ...] and `box_deltas` or `box_bins` [B, A, 4, ...], as the head says. The
      order of the A anchors is that of levels (finest first), rows, columns, and anchors of a
      position.
  """

  def __init__(
    self,
    channels: int,
    widths: Sequence[int],
    head: DetectionHead,
    *,
    neck_width: int = 32,
    blocks: int = 1,
    tower_depth: int = 1,
    dtype=None,
    axis_name=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization by fan-out; the predictors begin with small weights.

    Args:
      channels: number of channels of the images.
      widths: channels of the backbone's levels, at least two, with strides 2, 4, 8, ...; the first
        is that of a plain convolution.
      head: numbers of the head: `SSD`, `RetinaNet` or `YOLO`.
      neck_width: channels of the pyramid and the towers.
      blocks: number of residual blocks in each level after the first.
      tower_depth: number of 3x3 convolutions in each tower; 4 in RetinaNet.
      dtype: dtype of the computation and the outputs; parameters and batch statistics are float32.
        None: that of the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm computes its statistics;
        None: each device normalizes by its own rows.
      rngs: stream `params`.

    Raises:
      ValueError: fewer than two widths, or a number < 1.
    """
    if len(widths) < 2:
      raise ValueError(f"widths: expected at least two numbers >= 1, got {tuple(widths)}")
    numbers = {"neck_width": neck_width, "blocks": blocks, "tower_depth": tower_depth}
    for name, number in (*(("widths", width) for width in widths), *numbers.items()):
      check_integer(name, number, 1)
    options = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **options}
    self.channels = channels
    self.shapes = head.output_shapes
    self.anchors = head.anchors_per_position
    self.stem = ConvNorm(channels, widths[0], size=3, stride=2, **norms)
    pairs = list(zip(widths, widths[1:]))
    self.levels = nnx.data([_Level(a, b, blocks, **norms) for a, b in pairs])
    self.lateral = nnx.data([_conv(b, neck_width, size=1, **options) for _, b in pairs])
    self.smooth = nnx.data([_conv(neck_width, neck_width, **options) for _ in pairs])
    self.towers = nnx.data(
      {name: _tower(neck_width, tower_depth, **options) for name in self.shapes}
    )
    self.predictors = nnx.data(
      {
        name: _predictor(
          neck_width,
          self.anchors * math.prod(shape),
          head.class_bias if name == "class_logits" else 0.0,
          **options,
        )
        for name, shape in self.shapes.items()
      }
    )

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape, or a side that is no multiple of 2^n.
    """
    check_images(x, self.channels)
    self._check_sides(x.shape[1:3])
    x = nnx.relu(self.stem(x))
    outputs = {"c1": x}
    for k, level in enumerate(self.levels, 2):
      x = outputs[f"c{k}"] = level(x)
    pyramid = self._pyramid(outputs)
    return {**outputs, **pyramid, **self._predictions(pyramid)}

  def _pyramid(self, maps: Outputs) -> Outputs:
    pyramid = {}
    above = None
    for k in reversed(range(2, len(self.levels) + 2)):
      x = self.lateral[k - 2](maps[f"c{k}"])
      above = x if above is None else x + _double(above)
      pyramid[f"p{k}"] = self.smooth[k - 2](above)
    return dict(sorted(pyramid.items()))

  def _predictions(self, pyramid: Outputs) -> Outputs:
    predictions = {}
    for name, shape in self.shapes.items():
      rows = []
      for x in pyramid.values():
        for layer in self.towers[name]:
          x = layer(x)
        x = self.predictors[name](x)
        rows.append(x.reshape(x.shape[0], -1, *shape))
      predictions[name] = jnp.concatenate(rows, 1)
    return predictions

  def _check_sides(self, sides: tuple[int, ...]) -> None:
    divisor = 2 ** (len(self.levels) + 1)
    for name, side in zip(("height", "width"), sides):
      if side % divisor or not side:
        nearest = max(round(side / divisor), 1) * divisor
        raise ValueError(
          f"images: expected a {name} that {divisor} divides (2 for each level), got {side}: crop "
          f"or pad to {nearest}"
        )


class _Level(nnx.Module):
  """A 3x3 convolution of stride 2 and residual blocks: [B, H, W, inputs] -> [B, H / 2, W / 2,
  outputs], rectified."""

  def __init__(self, inputs, outputs, blocks, **norms):
    self.reduce = ConvNorm(inputs, outputs, size=3, stride=2, **norms)
    self.blocks = nnx.data([_Block(outputs, **norms) for _ in range(blocks)])

  def __call__(self, x):
    x = nnx.relu(self.reduce(x))
    for block in self.blocks:
      x = block(x)
    return x


class _Block(nnx.Module):
  """Two 3x3 convolutions and a shortcut (He et al. 2016), rectified: the shape stays."""

  def __init__(self, width, **norms):
    self.conv1 = ConvNorm(width, width, size=3, **norms)
    self.conv2 = ConvNorm(width, width, size=3, **norms)

  def __call__(self, x):
    return nnx.relu(x + self.conv2(nnx.relu(self.conv1(x))))


class _TowerLayer(nnx.Module):
  """A 3x3 convolution, group norm and SiLU: with ReLU, the many negatives of the first steps may
  silence a whole tower, whose logits then are their bias for good."""

  def __init__(self, width, *, dtype, rngs):
    self.conv = _conv(width, width, dtype=dtype, rngs=rngs)
    size = math.gcd(width, GROUP_SIZE)
    self.norm = nnx.GroupNorm(width, None, group_size=size, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return nnx.silu(self.norm(self.conv(x)))


def _tower(width, depth, **options) -> list[_TowerLayer]:
  return [_TowerLayer(width, **options) for _ in range(depth)]


def _conv(inputs, outputs, *, size=3, **options) -> nnx.Conv:
  init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
  return nnx.Conv(inputs, outputs, (size, size), kernel_init=init, **options)


def _predictor(inputs, outputs, bias, **options) -> nnx.Linear:
  """Returns a 1x1 convolution, with weights so small that the bias decides at first."""
  return nnx.Linear(
    inputs,
    outputs,
    kernel_init=nnx.initializers.normal(0.01),
    bias_init=nnx.initializers.constant(bias),
    **options,
  )


def _double(x: jax.Array) -> jax.Array:
  """Returns a map of twice the sides, each value repeated."""
  return x.repeat(2, 1).repeat(2, 2)
