"""Defines the U-Net for images (Ronneberger et al. 2015) and volumes (Cicek et al. 2016)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.types import Outputs

GROUP_SIZE = 8


class UNet(nnx.Module):
  """Levels of two 3x3 convolutions with 2x2 max pooling between them, and back up with skip
  connections to logits on the image's grid.

  Group norm (Wu & He 2018) follows each convolution. Volumes and large images leave memory for a
  few examples per batch, whose batch statistics are noisy, so that networks of this kind normalize
  each example by itself (nnU-Net, Isensee et al. 2021). A group has 8 channels, or the greatest
  common divisor of 8 and the width.

  With n + 1 widths there are n levels above the bottleneck, and each side of the image is a
  multiple of 2^n.

      teacher = UNet(1, (32, 64, 128, 256), 3, rngs=rngs)
      student = UNet(1, (8, 16), 3, spatial_dims=3, rngs=rngs)

  Outputs of images [B, H, W, channels] (volumes [B, D, H, W, channels] likewise), with k = 0 .. n -
  1:
    encoder_{k}: [B, H / 2^k, W / 2^k, widths[k]]: after the level's last ReLU, before pooling.
    bottleneck: [B, H / 2^n, W / 2^n, widths[n]].
    decoder_{k}: as encoder_{k}; decoder_0 is the last map, which the head reads.
    logits: [B, H, W, classes].
  """

  def __init__(
    self,
    channels: int,
    widths: Sequence[int],
    classes: int,
    *,
    spatial_dims: int = 2,
    dtype=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization (He et al. 2015, equation 10).

    Args:
      channels: number of channels of the images.
      widths: channels of each level from the image's resolution down to the bottleneck, at least
        two.
      classes: number of logits per pixel or voxel.
      spatial_dims: 2 for images, 3 for volumes.
      dtype: dtype of the computation and the outputs; parameters are float32. None: that of the
        input, float32 or wider.
      rngs: stream `params`.

    Raises:
      ValueError: fewer than two widths, a width < 1, or other `spatial_dims`.
    """
    if len(widths) < 2 or min(widths) < 1:
      raise ValueError(
        f"widths: expected at least two numbers >= 1 (one level and the bottleneck), got "
        f"{tuple(widths)}"
      )
    if spatial_dims not in (2, 3):
      raise ValueError(f"spatial_dims: expected 2 (images) or 3 (volumes), got {spatial_dims!r}")
    layers = {"spatial_dims": spatial_dims, "dtype": dtype, "rngs": rngs}
    *levels, bottom = widths
    self.channels = channels
    self.spatial_dims = spatial_dims
    self.encoder = nnx.data([_Level(a, b, **layers) for a, b in zip((channels, *levels), levels)])
    self.bottleneck = _Level(levels[-1], bottom, **layers)
    self.upsamplings = nnx.data(
      [_Upsample(below, width, **layers) for width, below in zip(levels, widths[1:])]
    )
    self.decoder = nnx.data([_Level(2 * width, width, **layers) for width in levels])
    self.head = nnx.Linear(levels[0], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels] or volumes [B, D, H, W, channels].

    Raises:
      ValueError: another shape, or a side that is no multiple of 2^n.
    """
    _check_input(x, self.channels, self.spatial_dims, len(self.encoder))
    outputs = {}
    for k, level in enumerate(self.encoder):
      outputs[f"encoder_{k}"] = level(x)
      x = _halve(outputs[f"encoder_{k}"])
    x = outputs["bottleneck"] = self.bottleneck(x)
    for k in reversed(range(len(self.encoder))):
      x = jnp.concatenate([outputs[f"encoder_{k}"], self.upsamplings[k](x)], -1)
      x = outputs[f"decoder_{k}"] = self.decoder[k](x)
    return {**outputs, "logits": self.head(x)}


class _Level(nnx.Module):
  """Two 3x3 convolutions, each with group norm and ReLU: [B, ..., inputs] -> [B, ..., outputs]."""

  def __init__(self, inputs, outputs, **layers):
    self.conv1 = _Conv(inputs, outputs, **layers)
    self.norm1 = _group_norm(outputs, **layers)
    self.conv2 = _Conv(outputs, outputs, **layers)
    self.norm2 = _group_norm(outputs, **layers)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.conv1(x)))
    return nnx.relu(self.norm2(self.conv2(x)))


class _Conv(nnx.Module):
  """A 3x3 or 3x3x3 convolution without bias, which the norm would cancel, padded with zeros."""

  def __init__(self, inputs, outputs, *, spatial_dims, dtype, rngs):
    shape = (3,) * spatial_dims + (inputs, outputs)
    self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape, jnp.float32))
    self.dtype = dtype

  def __call__(self, x):
    kernel = self.kernel[...]
    dtype = self.dtype or reduce.common_dtype(x, kernel)
    conv = conv_2d if x.ndim == 4 else conv_3d
    return conv(x.astype(dtype), kernel.astype(dtype))


class _Upsample(nnx.Module):
  """A transposed convolution of size 2 and stride 2 in each dimension, which doubles a map.

  Its patches do not overlap, so that it is one matrix product.
  """

  def __init__(self, inputs, outputs, *, spatial_dims, dtype, rngs):
    self.linear = nnx.Linear(inputs, 2**spatial_dims * outputs, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    sides = x.shape[1:-1]
    count = len(sides)
    x = self.linear(x).reshape(*x.shape[:-1], *(2,) * count, -1)
    # [B, H, W, 2, 2, C] -> [B, H, 2, W, 2, C].
    pairs = [axis for k in range(1, count + 1) for axis in (k, k + count)]
    x = x.transpose(0, *pairs, 2 * count + 1)
    return x.reshape(x.shape[0], *(2 * side for side in sides), -1)


def conv_2d(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the convolution [B, H, W, O] of [B, H, W, I] and a kernel [3, 3, I, O], padded with
  zeros."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def conv_3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the convolution [B, D, H, W, O] of [B, D, H, W, I] and a kernel [3, 3, 3, I, O], padded
  with zeros.

  It is one 2-D convolution of each slice next to its two neighbors, whose channels are side by
  side: XLA's 3-D convolution takes 8 times as long on a CPU.
  """
  batch, depth, *sides, inputs = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
  slices = jnp.concatenate([padded[:, tap : tap + depth] for tap in range(3)], -1)
  # [taps, 3, 3, I, O] -> [3, 3, taps I, O].
  flat_kernel = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, 3 * inputs, -1)
  out = conv_2d(slices.reshape(batch * depth, *sides, -1), flat_kernel)
  return out.reshape(batch, depth, *sides, -1)


def _group_norm(channels, *, spatial_dims, dtype, rngs) -> nnx.GroupNorm:
  del spatial_dims
  size = math.gcd(channels, GROUP_SIZE)
  return nnx.GroupNorm(channels, None, group_size=size, dtype=dtype, rngs=rngs)


def _halve(x: jax.Array) -> jax.Array:
  """Returns the largest value of each patch with sides of 2: [B, H, W, C] or [B, D, H, W, C]."""
  if x.ndim == 4:
    return max_pool(x)
  batch, depth, height, width, channels = x.shape
  x = max_pool(x.reshape(batch * depth, height, width, channels))
  # An axis of length 1 stays: this pools pairs of slices.
  x = max_pool(x.reshape(batch, depth, 1, -1))
  return x.reshape(batch, depth // 2, height // 2, width // 2, channels)


def _check_input(x: jax.Array, channels: int, spatial_dims: int, levels: int) -> None:
  names = ("depth", "height", "width")[-spatial_dims:]
  if x.ndim != spatial_dims + 2 or x.shape[-1] != channels:
    raise ValueError(
      f"images: expected [batch, {', '.join(names)}, channels={channels}], got {x.shape}"
    )
  divisor = 2**levels
  for name, side in zip(names, x.shape[1:-1]):
    if side % divisor or not side:
      nearest = max(round(side / divisor), 1) * divisor
      raise ValueError(
        f"images: expected a {name} that {divisor} divides (2 for each level above the "
        f"bottleneck), got {side}: crop or pad to {nearest}"
      )
