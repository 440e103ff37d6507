"""A small plain convolutional network."""

from collections.abc import Sequence

import jax
from flax import nnx

from distill_jax.models.zoo.pooling import max_pool
from distill_jax.types import Outputs


class ConvNormRelu(nnx.Module):
  """3x3 convolution of stride 1, batch norm, ReLU. No convolution bias: batch norm would cancel it.

  The running statistics keep 0.9 of their value at each step, not NNX's 0.99, which would leave them near
  their initial values in runs of a few hundred steps.
  """

  def __init__(self, inputs: int, outputs: int, *, dtype=None, axis_name=None, rngs: nnx.Rngs):
    he = nnx.initializers.he_normal()
    self.conv = nnx.Conv(
      inputs, outputs, (3, 3), use_bias=False, kernel_init=he, dtype=dtype, rngs=rngs
    )
    self.norm = nnx.BatchNorm(outputs, momentum=0.9, dtype=dtype, axis_name=axis_name, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H, W, outputs]."""
    return nnx.relu(self.norm(self.conv(x)))


def check_images(x: jax.Array, channels: int) -> None:
  """Raise a ValueError unless `x` is [B, H, W, channels]."""
  if x.ndim != 4 or x.shape[-1] != channels:
    raise ValueError(f"expected images [batch, height, width, channels={channels}], got {x.shape}")


class CNN(nnx.Module):
  """Blocks of convolution, batch norm, ReLU and 2x2 max pooling; the mean over the map; a linear head.

  Images may have any size: pooling drops an odd last row or column and leaves an axis of length 1 as it is.

  Outputs:
    block1, block2, ...: [B, H_k, W_k, widths[k-1]]: after the ReLU, before the block's pooling, so block1 has
      the image's size and each further one half of the last.
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
    """Build the layers with He initialization (He et al. 2015, equation 10).

    Args:
      channels: of the images.
      widths: channels of each block, at least one.
      classes: number of logits.
      dtype: of the computation and the outputs; parameters and batch statistics are float32. None: that of
        the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm takes its statistics.
      rngs: stream `params`.

    Raises:
      ValueError: `widths` is empty.
    """
    if not widths:
      raise ValueError("widths is empty: a CNN needs at least one block")
    sizes = (channels, *widths)
    self.channels = channels
    self.blocks = nnx.List(
      ConvNormRelu(a, b, dtype=dtype, axis_name=axis_name, rngs=rngs)
      for a, b in zip(sizes, sizes[1:])
    )
    self.head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    """Outputs of images [B, H, W, channels]. Raises ValueError for another shape."""
    check_images(x, self.channels)
    outputs = {}
    for number, block in enumerate(self.blocks, 1):
      x = outputs[f"block{number}"] = block(x)
      x = max_pool(x)
    embedding = x.mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}
