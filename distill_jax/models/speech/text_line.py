"""Defines recognizers of text lines: convolutions over the picture, and blocks over its columns.

config = FrameEncoderConfig(60, 64, 2, layer="gru")
make = lambda rngs: TextLineEncoder(config, rngs=rngs)
student = from_nnx(make, inputs=("image", "widths"))
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import check_integer
from distill_jax.models.remat import check_policy
from distill_jax.models.seq2seq.attention import linear
from distill_jax.models.speech.frame_blocks import FrameStack
from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.zoo.cnn import ConvNormRelu, layer_sizes
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.types import Outputs

_COLUMNS = 4
"""Number of columns of a picture that are one frame."""


class TextLineEncoder(nnx.Module):
  """Convolutions that pool a line to a row of frames, blocks over them and a head, for CTC: the
  CRNN of Shi et al. 2017 with 'gru', near SVTR (Du et al. 2022) with 'conformer'.

  Its outputs are `logits` [B, W / 4, vocab_size], `lengths` int32 [B], `block{k}` and, of
  'conformer', `attention{k}`, as in `FrameStack`; `map{k}` [B, H_k, W_k, widths[k-1]] is the map of
  a convolution before its pooling.

  >>> config = FrameEncoderConfig(60, 16, 1, layer="gru")
  >>> network = TextLineEncoder(config, widths=(4, 8, 8), rngs=nnx.Rngs(0))
  >>> outputs = network(jnp.ones((2, 32, 100, 1)), jnp.array([100, 41]))
  >>> outputs["logits"].shape, outputs["lengths"].tolist()
  ((2, 25, 60), [25, 11])
  """

  def __init__(
    self,
    config: FrameEncoderConfig,
    *,
    widths: Sequence[int] = (16, 32, 64, 64),
    height: int = 32,
    channels: int = 1,
    dtype: Any = None,
    remat: str = "",
    axis_name: Any = None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      config: sizes of the blocks and the head.
      widths: channels of the convolutions. Each halves the height, and the first one the width as
        well; they begin with patches of 2 x 2 pixels.
      height: of the pictures, a multiple of 2^(1 + len(widths)).
      channels: of the pictures.
      dtype, remat: as in `SpeechEncoder`; batch norms are float32.
      axis_name: as in `zoo.cnn.CNN`.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: no convolution, a height that they do not divide, or an unknown policy.
    """
    check_policy(remat)
    # Four times less to compute than a first convolution of all pixels.
    sizes = layer_sizes(4 * channels, widths)
    rows = 2 ** (1 + len(widths))
    if check_integer("height", height, 1) % rows:
      raise ValueError(
        f"height: expected a multiple of {rows} for {len(widths)} widths, got {height}"
      )
    self.shape = height, channels
    self.dtype = dtype or jnp.float32
    options = {"dtype": self.dtype, "rngs": rngs}
    self.convs = nnx.data(
      [ConvNormRelu(a, b, axis_name=axis_name, **options) for a, b in zip(sizes, sizes[1:])]
    )
    column = sizes[-1] * (height // rows)
    self.input = linear(column, config.embed_dim, bias=True, **options)
    self.stack = FrameStack(config, remat=remat, **options)

  def __call__(self, image: jax.Array, widths: jax.Array | None = None) -> Outputs:
    """Returns the outputs of pictures of text lines.

    Args:
      image: [B, height, W, channels], W a multiple of 4.
      widths: int [B], number of valid columns, from the left; more than W count as W. None: all are
        valid. What is beyond them changes nothing.

    Raises:
      ValueError: pictures or widths of another shape.
    """
    self._check(image, widths)
    width = image.shape[2]
    if widths is None:
      valid = jnp.full(image.shape[0], width, jnp.int32)
    else:
      valid = jnp.clip(widths, 0, width).astype(jnp.int32)
    x = _patches(_blank_columns(image, valid).astype(self.dtype))
    valid = (valid + 1) // 2
    maps = {}
    for number, conv in enumerate(self.convs, 1):
      x = _blank_columns(conv(x, mask=_valid_columns(x, valid)), valid)
      maps[f"map{number}"] = x
      if number == 1:
        # After the ReLU, columns of zeros do not change a maximum.
        x = max_pool(x)
        valid = (valid + 1) // 2
      else:
        x = jnp.maximum(x[:, ::2], x[:, 1::2])
    columns = x.swapaxes(1, 2).reshape(x.shape[0], width // _COLUMNS, -1)
    return {**maps, **self.stack(self.input(columns), valid)}

  def _check(self, image: jax.Array, widths: jax.Array | None) -> None:
    height, channels = self.shape
    if image.ndim != 4 or (image.shape[1], image.shape[3]) != self.shape or not image.shape[2]:
      raise ValueError(
        f"image: expected [batch, height={height}, width, channels={channels}], got {image.shape}"
      )
    if image.shape[2] % _COLUMNS:
      raise ValueError(
        f"image: expected a width that is a multiple of {_COLUMNS}, got {image.shape}: pad it"
      )
    if widths is not None and widths.shape != image.shape[:1]:
      raise ValueError(
        f"widths: expected one number for each row, {image.shape[:1]}, got {widths.shape}"
      )


def _patches(x: jax.Array) -> jax.Array:
  """Returns [B, H / 2, W / 2, 4 C]: the pixels of each patch side by side."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.swapaxes(2, 3).reshape(batch, height // 2, width // 2, 4 * channels)


def _valid_columns(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Returns which columns of x [B, H, W, C] are valid, bool [B, 1, W, 1]."""
  return (jnp.arange(x.shape[2]) < valid[:, None])[:, None, :, None]


def _blank_columns(x: jax.Array, valid: jax.Array) -> jax.Array:
  return jnp.where(_valid_columns(x, valid), x, 0)
