"""Unsigned integers of a few bits each, packed into 32-bit words.

Value i of width w is bits i w to i w + w - 1 of its row, bit b being bit b mod 32 of word b // 32 (the least
significant is bit 0); the bits after the last value are 0. The positions are known when the program is traced, so
both ways are gathers and shifts of whole words.
"""

import jax
import jax.numpy as jnp
import numpy as np


def width_of(count: int) -> int:
  """Bits that hold the integers 0 to count - 1, at least 1."""
  return max(1, (count - 1).bit_length())


def words_of(count: int, width: int) -> int:
  """32-bit words that hold `count` values of `width` bits."""
  return -(-count * width // 32)


def pack(values: jax.Array, width: int) -> jax.Array:
  """Integers [..., n] below 2^width, 1 <= width <= 32, as uint32 words [..., words_of(n, width)]."""
  count = values.shape[-1]
  starts = 32 * np.arange(words_of(count, width))
  # The values that begin in a word or reach into it from the one before: at most so many.
  index = starts[:, None] // width + np.arange(31 // width + 2)
  shift = index * width - starts[:, None]
  present = (index < count) & (shift < 32)
  chosen = values.astype(jnp.uint32)[..., np.where(present, index, 0)]
  moved = jnp.where(
    shift >= 0,
    chosen << np.uint32(np.clip(shift, 0, 31)),
    chosen >> np.uint32(np.clip(-shift, 0, 31)),
  )
  return jnp.where(present, moved, 0).sum(-1, dtype=jnp.uint32)  # no two share a bit


def unpack(words: jax.Array, width: int, count: int) -> jax.Array:
  """The first `count` values of `width` bits of uint32 words [..., m], as uint32 [..., count]."""
  starts = width * np.arange(count)
  first, shift = starts // 32, np.uint32(starts % 32)
  second = np.minimum(first + 1, words.shape[-1] - 1)
  # Two shifts: one by 32, where a value begins with its word, is not defined.
  high = (words[..., second] << np.uint32(1)) << (np.uint32(31) - shift)
  return ((words[..., first] >> shift) | high) & np.uint32(2**width - 1)
