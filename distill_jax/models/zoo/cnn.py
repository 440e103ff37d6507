"""Defines a small plain convolutional network, and the block that it shares with VGG."""

from collections.abc import Sequence

import jax
from flax import nnx

from distill_jax.errors import check_integer
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.types import Outputs


class ConvNormRelu(nnx.Module):
  """A 3x3 convolution of stride 1 without bias, batch norm and ReLU.

  A bias would be canceled by the batch norm. The running statistics keep 0.9 of their value at each
  step: NNX's 0.99 would leave them near their initial values in runs of a few hundred steps.
  """

  def __init__(self, inputs: int, outputs: int, *, dtype=None, axis_name=None, rngs: nnx.Rngs):
    he = nnx.initializers.he_normal()
    self.conv = nnx.Conv(
      inputs, outputs, (3, 3), use_bias=False, kernel_init=he, dtype=dtype, rngs=rngs
    )
    self.norm = nnx.BatchNorm(outputs, momentum=0.9, dtype=dtype, axis_name=axis_name, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the map [B, H, W, outputs] of a map [B, H, W, inputs].

    Args:
      x: the map.
      mask: bool, broadcastable to the result: what the norm's statistics count; None: all.
    """
    return nnx.relu(self.norm(self.conv(x), mask=mask))


def check_images(x: jax.Array, channels: int) -> None:
  """Checks that `x` is [B, H, W, channels].

  Raises:
    ValueError: another shape.
  """
  if x.ndim != 4 or x.shape[-1] != channels:
    raise ValueError(f"images: expected [batch, height, width, channels={channels}], got {x.shape}")


def layer_sizes(channels: int, widths: Sequence[int]) -> tuple[int, ...]:
  """Returns the channels before and after each block.

  Raises:
    ValueError: there is no block, or one without channels.
  """
  if not widths:
    raise ValueError("widths: expected the channels of at least one block, got none")
  for width in widths:
    check_integer("widths", width, 1)
  return (channels, *widths)


class CNN(nnx.Module):
  """Blocks of convolution, batch norm, ReLU and 2x2 max pooling, then the map's mean and a linear
  head.

  Images may have any size: pooling drops an odd last row or column, and an axis of length 1 stays.

  Outputs:
    block1, block2, ...: [B, H_k, W_k, widths[k-1]]: after the ReLU, before the block's pooling, so
      block1 has the image's size and each further one half of the last.
    embedding: [B, widths[-1]]: the mean over the last pooled map.
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
    """Builds the layers with He initialization (He et al. 2015, equation 10).

    Args:
      channels: number of channels of the images.
      widths: channels of each block, at least one.
      classes: number of logits.
      dtype: dtype of the computation and the outputs; parameters and batch statistics are float32.
        None: that of the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm computes its statistics;
        None: each device normalizes by its own rows.
      rngs: stream `params`.

    Raises:
      ValueError: `widths` is empty, or has a number below 1.
    """
    sizes = layer_sizes(channels, widths)
    self.channels = channels
    self.blocks = nnx.data(
      [
        ConvNormRelu(a, b, dtype=dtype, axis_name=axis_name, rngs=rngs)
        for a, b in zip(sizes, sizes[1:])
      ]
    )
    self.head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    outputs = {}
    for number, block in enumerate(self.blocks, 1):
      outputs[f"block{number}"] = block(x)
      x = max_pool(outputs[f"block{number}"])
    embedding = x.mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}
