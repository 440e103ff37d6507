"""Defines small networks of clips [B, T, H, W, C].

Convolutions over space see frames as rows, [B T, H, W, C], and those over time are products: XLA's
3-D convolution takes several times as long on a CPU. No network changes the number of frames, so
that features of any two can be compared.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.zoo.cnn import ConvNormRelu, layer_sizes
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.models.zoo.sequence import (
  TimeConvNormRelu,
  blank_steps,
  check_steps,
  pad_steps,
  pool_and_classify,
  step_mask,
)
from distill_jax.types import Outputs


class CNN2Plus1D(nnx.Module):
  """Blocks of a 3x3 convolution over space, one of 3 frames over time, and 2x2 max pooling.

  Batch norm and ReLU follow both convolutions of a block. Tran et al. 2018 (arXiv:1711.11248)
  factorize 3-D convolutions so; their R(2+1)D also has shortcuts, strides over time, and more
  channels between the two. The mean over frames and map, and a linear head, follow the last block.

      teacher = from_nnx(lambda rngs: CNN2Plus1D(1, (16, 32, 64), 8, rngs=rngs))

  Outputs:
    block1, block2, ...: [B, T, H_k, W_k, widths[k-1]]: before the block's pooling, so block1 has
      the frames' size and each further one half of the last.
    embedding: [B, widths[-1]]: the mean over the last pooled map and the valid frames.
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
      channels, widths, classes, dtype, axis_name, rngs: as in `zoo.cnn.CNN`.

    Raises:
      ValueError: `widths` is empty.
    """
    options = {"dtype": dtype, "axis_name": axis_name, "rngs": rngs}
    sizes = layer_sizes(channels, widths)
    self.channels = channels
    self.space = nnx.data([ConvNormRelu(a, b, **options) for a, b in zip(sizes, sizes[1:])])
    self.time = nnx.data([TimeConvNormRelu(b, b, **options) for b in widths])
    self.head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> Outputs:
    """Returns the outputs of clips.

    Args:
      x: clips [B, T, H, W, channels].
      valid: bool [B, T]: frames that count, such as a batch's 'image_valid'; None: all.

    Raises:
      ValueError: clips or `valid` of another shape.
    """
    x = check_steps("clips", x, self.channels, 5, valid)
    outputs: dict[str, jax.Array] = {}
    for number, (space, time) in enumerate(zip(self.space, self.time), 1):
      x = blank_steps(
        time(blank_steps(_per_frame(space, x, valid), valid), step_mask(valid, 5)), valid
      )
      outputs[f"block{number}"] = x
      x = _per_frame(max_pool, x)
    return outputs | pool_and_classify(x, valid, self.head)


class FrameCNN(nnx.Module):
  """The blocks of `zoo.cnn.CNN` on each frame, and the mean over frames: a 2-D student of clips.

  The mean cannot tell the order of frames. With `shift`, each block but the first sees that
  fraction of its input channels from the frame before and as many from the frame after: the
  temporal shift of Lin et al. 2019 (TSM, arXiv:1811.08383), which costs nothing. The first block
  sees pixels, which are not shifted.

      student = from_nnx(lambda rngs: FrameCNN(1, (8, 16, 32), 8, rngs=rngs))

  Outputs: as of `CNN2Plus1D`.
  """

  def __init__(
    self,
    channels: int,
    widths: Sequence[int],
    classes: int,
    *,
    shift: float = 0.125,
    dtype=None,
    axis_name=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization.

    Args:
      channels, widths, classes, dtype, axis_name, rngs: as in `zoo.cnn.CNN`.
      shift: fraction of channels from each neighbor, 0 to 0.5; the paper's is 1/8. 0: every frame
        by itself.

    Raises:
      ValueError: `widths` is empty, or `shift` out of its range or less than one channel.
    """
    options = {"dtype": dtype, "axis_name": axis_name, "rngs": rngs}
    sizes = layer_sizes(channels, widths)
    if not 0 <= shift <= 0.5:
      raise ValueError(f"shift: expected a fraction from 0 to 0.5, got {shift}")
    narrowest = min(widths[:-1], default=2)
    if shift and min(round(shift * narrowest), narrowest // 2) == 0:
      raise ValueError(
        f"shift: expected at least one of the {narrowest} channels of a block, got {shift}: write "
        f"{1 / narrowest:g} or more, or 0"
      )
    self.channels = channels
    self.shift = shift
    self.blocks = nnx.data([ConvNormRelu(a, b, **options) for a, b in zip(sizes, sizes[1:])])
    self.head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> Outputs:
    """Returns the outputs of clips; arguments and errors as of `CNN2Plus1D`."""
    x = check_steps("clips", x, self.channels, 5, valid)
    outputs: dict[str, jax.Array] = {}
    for number, block in enumerate(self.blocks, 1):
      if number > 1:
        x = shift_frames(x, self.shift)
      x = blank_steps(_per_frame(block, x, valid), valid)
      outputs[f"block{number}"] = x
      x = _per_frame(max_pool, x)
    return outputs | pool_and_classify(x, valid, self.head)


def shift_frames(x: jax.Array, fraction: float) -> jax.Array:
  """Returns x [B, T, ..., C] with some channels from the next step, and as many from the last one.

  Steps beyond the ends are zeros.
  """
  count = min(round(fraction * x.shape[-1]), x.shape[-1] // 2)
  if count == 0:
    return x
  padded = pad_steps(x, 1)
  after = padded[:, 2:, ..., :count]
  before = padded[:, :-2, ..., count : 2 * count]
  return jnp.concatenate([after, before, x[..., 2 * count :]], -1)


def _per_frame(function, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
  """Returns a function of maps [B, H, W, C] applied to all frames of [B, T, H, W, C]."""
  frames = x.reshape(-1, *x.shape[2:])
  options = () if valid is None else (valid.reshape(-1, 1, 1, 1),)
  result = function(frames, *options)
  return result.reshape(*x.shape[:2], *result.shape[1:])
