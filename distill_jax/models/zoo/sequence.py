"""Defines a small network of series [B, T, C], and the convolution over time that clips share.

A convolution over time is one product with the channels of neighboring steps side by side. No layer
changes the number of steps, so that features of any two networks can be compared.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.zoo.cnn import layer_sizes
from distill_jax.types import Outputs


class TimeConvNormRelu(nnx.Module):
  """A convolution along axis 1 of [B, T, ..., inputs] without bias, batch norm and ReLU.

  Zeros precede the first step and follow the last.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    size: int = 3,
    dilation: int = 1,
    dtype=None,
    axis_name=None,
    rngs: nnx.Rngs,
  ):
    he = nnx.initializers.he_normal()
    self.size = size
    self.dilation = dilation
    self.linear = nnx.Linear(
      size * inputs, outputs, use_bias=False, kernel_init=he, dtype=dtype, rngs=rngs
    )
    self.norm = nnx.BatchNorm(outputs, momentum=0.9, dtype=dtype, axis_name=axis_name, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns [B, T, ..., outputs]; `mask` is what the norm's statistics count, None: all."""
    steps = x.shape[1]
    reach = self.dilation * (self.size // 2)
    padded = pad_steps(x, reach)
    taps = [padded[:, i * self.dilation :][:, :steps] for i in range(self.size)]
    return nnx.relu(self.norm(self.linear(jnp.concatenate(taps, -1)), mask=mask))


class SequenceCNN(nnx.Module):
  """Convolutions of 3 steps over series, of dilations 1, 2, 4, ..., the mean and a linear head.

  The layers over time of `CNN2Plus1D`, with the dilations of Bai et al. 2018 (arXiv:1803.01271).

      teacher = from_nnx(lambda rngs: SequenceCNN(6, (64, 64, 64, 64), 7, rngs=rngs), inputs="x")

  Outputs:
    block1, block2, ...: [B, T, widths[k-1]].
    embedding: [B, widths[-1]]: the mean over the valid steps.
    logits: [B, classes].
  """

  def __init__(
    self,
    channels: int,
    widths: Sequence[int],
    classes: int,
    *,
    dtype=None,
    axis_name=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization.

    Args:
      channels: number of channels of the series.
      widths, classes, dtype, axis_name, rngs: as in `zoo.cnn.CNN`.

    Raises:
      ValueError: `widths` is empty.
    """
    options = {"dtype": dtype, "axis_name": axis_name, "rngs": rngs}
    sizes = layer_sizes(channels, widths)
    self.channels = channels
    self.blocks = nnx.data(
      [
        TimeConvNormRelu(a, b, dilation=2**i, **options)
        for i, (a, b) in enumerate(zip(sizes, sizes[1:]))
      ]
    )
    self.head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> Outputs:
    """Returns the outputs of series [B, T, channels]; `valid` as of `CNN2Plus1D`."""
    x = check_steps("series", x, self.channels, 3, valid)
    outputs: dict[str, jax.Array] = {}
    for number, block in enumerate(self.blocks, 1):
      x = blank_steps(block(x, step_mask(valid, 3)), valid)
      outputs[f"block{number}"] = x
    return outputs | pool_and_classify(x, valid, self.head)


def pool_and_classify(
  x: jax.Array, valid: jax.Array | None, head: nnx.Linear
) -> dict[str, jax.Array]:
  """Returns the mean of [B, T, ..., C] over space and valid steps, and the head's logits."""
  steps = x.mean(tuple(range(2, x.ndim - 1)))
  if valid is None:
    embedding = steps.mean(1)
  else:
    count = jnp.maximum(valid.sum(1, keepdims=True), 1)
    embedding = blank_steps(steps, valid).sum(1) / count.astype(steps.dtype)
  return {"embedding": embedding, "logits": head(embedding)}


def blank_steps(x: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Returns x [B, T, ...] with zeros in steps that do not count, as beyond both ends."""
  mask = step_mask(valid, x.ndim)
  return x if mask is None else jnp.where(mask, x, 0)


def step_mask(valid: jax.Array | None, ndim: int) -> jax.Array | None:
  """Returns `valid` [B, T] with `ndim` axes, to go with [B, T, ...]."""
  return None if valid is None else valid.reshape(*valid.shape, *(1,) * (ndim - 2))


def pad_steps(x: jax.Array, steps: int) -> jax.Array:
  """Returns x [B, T, ...] with zeros before the first step and after the last."""
  return jnp.pad(x, [(0, 0), (steps, steps)] + [(0, 0)] * (x.ndim - 2))


def check_steps(
  kind: str, x: jax.Array, channels: int, ndim: int, valid: jax.Array | None
) -> jax.Array:
  """Returns clips or series with zeros in steps that do not count.

  Raises:
    ValueError: they or `valid` have another shape.
  """
  axes = ["batch", "time", "height", "width"][: ndim - 1]
  if x.ndim != ndim or x.shape[-1] != channels:
    raise ValueError(f"{kind}: expected [{', '.join(axes)}, channels={channels}], got {x.shape}")
  if valid is not None and valid.shape != x.shape[:2]:
    raise ValueError(f"valid: expected bool {list(x.shape[:2])}, got {list(valid.shape)}")
  return blank_steps(x, valid)
