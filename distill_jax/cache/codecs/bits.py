"""Packs unsigned integers of a few bits each into 32-bit words.

Value i of width w is bits i w to i w + w - 1 of its row, bit b being bit b mod 32 of word b // 32
(the least significant is bit 0); the bits after the last value are 0. The positions are constants
of the traced program, so packing and unpacking are gathers and shifts of full words.
"""

import jax
import jax.numpy as jnp
import numpy as np


def bit_width(count: int) -> int:
  """Returns the bits that hold the integers 0 to count - 1, at least 1."""
  return max(1, (count - 1).bit_length())


def word_count(count: int, width: int) -> int:
  """Returns the 32-bit words that hold `count` values of `width` bits."""
  return -(-count * width // 32)


def pack(values: jax.Array, width: int) -> jax.Array:
  """Returns integers [..., n] < 2^width, 1 <= width <= 32, as uint32 words [..., word_count]."""
  count = values.shape[-1]
  starts = 32 * np.arange(word_count(count, width))
  # At most so many values begin in a word or reach into it from the one before.
  index = starts[:, None] // width + np.arange(31 // width + 2)
  shift = index * width - starts[:, None]
  present = (index < count) & (shift < 32)
  gathered = values.astype(jnp.uint32)[..., np.where(present, index, 0)]
  left, right = (np.clip(s, 0, 31).astype(np.uint32) for s in (shift, -shift))
  shifted = jnp.where(
    shift >= 0, gathered << _expand(left, gathered), gathered >> _expand(right, gathered)
  )
  # No two values share a bit, so the sum is their union.
  return jnp.where(present, shifted, 0).sum(-1, dtype=jnp.uint32)


def unpack(words: jax.Array, width: int, count: int) -> jax.Array:
  """Returns the first `count` values of `width` bits of words [..., m], uint32 [..., count]."""
  starts = width * np.arange(count)
  first = starts // 32
  shift = _expand((starts % 32).astype(np.uint32), words)
  second = np.minimum(first + 1, words.shape[-1] - 1)
  # Two shifts, because one by 32, where a value begins with its word, is not defined.
  high = (words[..., second] << np.uint32(1)) << (np.uint32(31) - shift)
  return ((words[..., first] >> shift) | high) & np.uint32(2**width - 1)


def _expand(constant: np.ndarray, like: jax.Array) -> np.ndarray:
  """Returns a constant with as many axes as `like`, for `jax_numpy_rank_promotion="raise"`."""
  return constant.reshape((1,) * (like.ndim - constant.ndim) + constant.shape)
