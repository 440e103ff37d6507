"""Defines VGG with batch norm (Simonyan & Zisserman 2015, table 1)."""

import jax
from flax import nnx

from distill_jax.models.zoo.cnn import ConvNormRelu, check_images
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.types import Outputs

_WIDTHS = (64, 128, 256, 512, 512)
# Convolutions per block: configurations A, B, D and E of table 1.
_CONVOLUTIONS = {
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}


class VGG(nnx.Module):
  """Five blocks of 3x3 convolutions with batch norm and ReLU, each pooled by 2x2 maxima, and a
  linear head.

  The convolutions are the paper's, with batch norm instead of biases. The mean over the last map
  and one linear layer replace the paper's three fully connected layers, as in RepDistiller's VGG
  for CIFAR, so that images may have any size (8x8 to 224x224 are tested). Pooling drops an odd last
  row or column, and an axis of length 1 stays: an 8x8 image is 1x1 from block4 on, and a 32x32 one
  2x2 in block5.

  Outputs:
    block1, ..., block5: [B, H_k, W_k, C_k]: after the block's last ReLU, before its pooling; block1
      has the image's size, C_k = 64, 128, 256, 512, 512 times `width`.
    embedding: [B, C_5]: the mean over the last pooled map, before dropout.
    logits: [B, classes].
  """

  def __init__(
    self,
    channels: int,
    depth: int,
    classes: int,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
    dtype=None,
    axis_name=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization (He et al. 2015, equation 10).

    Args:
      channels: number of channels of the images.
      depth: number of layers, 11, 13, 16 or 19 (configurations A, B, D, E of table 1).
      classes: number of logits.
      width: multiplier of every block's channels, which are rounded and at least 1.
      dropout: probability that a value of the embedding is dropped, in training; 0 needs no random
        stream.
      dtype: dtype of the computation and the outputs; parameters and batch statistics are float32.
        None: that of the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm computes its statistics;
        None: each device normalizes by its own rows.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: unknown depth, or width <= 0.
    """
    if depth not in _CONVOLUTIONS:
      nearest = min(_CONVOLUTIONS, key=lambda number: abs(number - depth))
      raise ValueError(
        f"depth: expected one of {tuple(_CONVOLUTIONS)}, got {depth}; nearest is {nearest}"
      )
    if width <= 0:
      raise ValueError(f"width: expected a multiplier > 0 (1.0 in the paper), got {width}")
    widths = [max(1, round(width * w)) for w in _WIDTHS]

    def block(inputs, outputs, count):
      sizes = [inputs] + [outputs] * count
      return [
        ConvNormRelu(a, b, dtype=dtype, axis_name=axis_name, rngs=rngs)
        for a, b in zip(sizes, sizes[1:])
      ]

    self.channels = channels
    self.blocks = nnx.data([*map(block, [channels, *widths], widths, _CONVOLUTIONS[depth])])
    self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)
    self.head = nnx.Linear(widths[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    outputs = {}
    for number, block in enumerate(self.blocks, 1):
      for layer in block:
        x = layer(x)
      outputs[f"block{number}"] = x
      x = max_pool(x)
    embedding = x.mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(self.dropout(embedding))}
