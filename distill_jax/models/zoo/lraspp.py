"""Defines a light network for segmentation: an encoder of inverted residuals and the head LR-ASPP.

Sources: MobileNetV2 (Sandler et al. 2018) for the encoder, MobileNetV3 (Howard et al. 2019, section
6.4 and figure 10) for the head.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.models.zoo.cnn import check_images
from distill_jax.types import Outputs


class LRASPP(nnx.Module):
  """A convolution and levels of inverted residuals, each at half the resolution of the one before,
  then a head that joins the last map with the one at a quarter of the image's sides.

  Images may have any size: a level has half of the sides, rounded up.

      student = LRASPP(3, (8, 12, 16, 24), 3, rngs=rngs)

  Outputs, with k = 0 .. n - 1 for n widths:
    encoder_{k}: [B, H_k, W_k, widths[k]], H_k = H / 2^(k+1): of encoder_0 after the ReLU, of the
      others the linear sum that ends the level.
    head: [B, H_{n-1}, W_{n-1}, head_width]: the last map, weighted per channel by a gate that reads
      its mean.
    logits: [B, H, W, classes], or [B, H_1, W_1, classes] with `stride=4`.
  """

  def __init__(
    self,
    channels: int,
    widths: Sequence[int],
    classes: int,
    *,
    expansion: int = 4,
    blocks: int = 2,
    head_width: int = 64,
    stride: int = 1,
    dtype=None,
    axis_name=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization by fan-out.

    Args:
      channels: number of channels of the images.
      widths: channels of each level, at least three; the first is that of the plain convolution.
      classes: number of logits per pixel.
      expansion: factor of the channels inside an inverted residual; 6 in the paper.
      blocks: number of inverted residuals in each level after the first.
      head_width: channels of the head; 128 in the paper.
      stride: 1 interpolates the logits bilinearly to the image's grid; 4 leaves them at a quarter
        of its sides.
      dtype: dtype of the computation and the outputs; parameters and batch statistics are float32.
        None: that of the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm computes its statistics;
        None: each device normalizes by its own rows.
      rngs: stream `params`.

    Raises:
      ValueError: fewer than three widths, a number < 1, or another stride.
    """
    if len(widths) < 3 or min(widths) < 1:
      raise ValueError(f"widths: expected at least three numbers >= 1, got {tuple(widths)}")
    for name, number in (("expansion", expansion), ("blocks", blocks), ("head_width", head_width)):
      if number < 1:
        raise ValueError(f"{name}: expected a number >= 1, got {number}")
    if stride not in (1, 4):
      raise ValueError(
        f"stride: expected 1 (logits on the image's grid) or 4 (at a quarter of its sides), got "
        f"{stride!r}"
      )
    layers = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
    self.channels = channels
    self.stride = stride
    self.stem = ConvNorm(channels, widths[0], size=3, stride=2, **layers)
    self.levels = nnx.data(
      [_level(a, b, expansion, blocks, layers) for a, b in zip(widths, widths[1:])]
    )
    self.project = ConvNorm(widths[-1], head_width, **layers)
    self.gate = nnx.Linear(widths[-1], head_width, use_bias=False, dtype=dtype, rngs=rngs)
    self.low_logits = nnx.Linear(widths[1], classes, dtype=dtype, rngs=rngs)
    self.high_logits = nnx.Linear(head_width, classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    sides = x.shape[1:3]
    x = nnx.relu6(self.stem(x))
    outputs = {"encoder_0": x}
    for k, level in enumerate(self.levels, 1):
      for block in level:
        x = block(x)
      outputs[f"encoder_{k}"] = x
    gate = nnx.sigmoid(self.gate(x.mean((1, 2), keepdims=True)))
    outputs["head"] = nnx.relu(self.project(x)) * gate
    low = self.low_logits(outputs["encoder_1"])
    logits = low + _resize(self.high_logits(outputs["head"]), low.shape[1:3])
    return {**outputs, "logits": logits if self.stride == 4 else _resize(logits, sides)}


class _InvertedResidual(nnx.Module):
  """A 1x1 convolution to more channels, a depthwise 3x3 one, and a linear one back: [B, H, W,
  inputs] -> [B, H / stride, W / stride, outputs]."""

  def __init__(self, inputs, outputs, expansion, stride, **layers):
    inner = expansion * inputs
    self.expand = ConvNorm(inputs, inner, **layers)
    self.depthwise = _Depthwise(inner, stride, **layers)
    self.project = ConvNorm(inner, outputs, **layers)
    self.has_shortcut = inputs == outputs and stride == 1

  def __call__(self, x):
    out = nnx.relu6(self.depthwise(nnx.relu6(self.expand(x))))
    out = self.project(out)
    return x + out if self.has_shortcut else out


class ConvNorm(nnx.Module):
  """A convolution without bias, padded equally on both sides, and batch norm: [B, H, W, inputs] ->
  [B, H / stride, W / stride, outputs]."""

  def __init__(
    self, inputs: int, outputs: int, *, size: int = 1, stride: int = 1, axis_name, dtype, rngs
  ):
    side = (size // 2, size // 2)
    self.conv = nnx.Conv(
      inputs,
      outputs,
      (size, size),
      stride,
      padding=(side, side),
      use_bias=False,
      kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = _batch_norm(outputs, axis_name=axis_name, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.conv(x))


class _Depthwise(nnx.Module):
  """A 3x3 convolution of each channel by itself, padded with zeros, and batch norm."""

  def __init__(self, channels, stride, *, axis_name, dtype, rngs):
    # Each output has 9 weights: the fan-out of the kernel is 9.
    init = nnx.initializers.normal((2 / 9) ** 0.5)
    self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels), jnp.float32))
    self.norm = _batch_norm(channels, axis_name=axis_name, dtype=dtype, rngs=rngs)
    self.stride = stride
    self.dtype = dtype

  def __call__(self, x):
    kernel = self.kernel[...]
    dtype = self.dtype or reduce.common_dtype(x, kernel)
    return self.norm(depthwise_conv(x.astype(dtype), kernel.astype(dtype), self.stride))


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Returns the convolution [B, H / stride, W / stride, C] of each channel of [B, H, W, C] with its
  own kernel [3, 3, C], padded with zeros.

  It is a sum of nine shifted products: XLA's grouped convolution takes 10 times as long on a CPU
  (5 times with gradients).
  """
  rows, columns = (-(-side // stride) for side in x.shape[1:3])
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  taps = [
    padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride] * kernel[i, j]
    for i in range(3)
    for j in range(3)
  ]
  return functools.reduce(jnp.add, (tap[:, :rows, :columns] for tap in taps))


def _level(inputs, outputs, expansion, blocks, layers) -> list[_InvertedResidual]:
  first = _InvertedResidual(inputs, outputs, expansion, 2, **layers)
  others = [_InvertedResidual(outputs, outputs, expansion, 1, **layers) for _ in range(blocks - 1)]
  return [first, *others]


def _batch_norm(channels, *, axis_name, dtype, rngs) -> nnx.BatchNorm:
  return nnx.BatchNorm(channels, momentum=0.9, dtype=dtype, axis_name=axis_name, rngs=rngs)


def _resize(x: jax.Array, sides: tuple[int, ...]) -> jax.Array:
  return jax.image.resize(x, (x.shape[0], *sides, x.shape[-1]), "bilinear")
