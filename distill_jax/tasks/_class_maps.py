"""Stores maps of class numbers in few bytes, for scores on the host and for pictures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_PIXELS = 256
"""Height and width of a map in a picture, at most."""


def no_class(maps: Any) -> int:
  """Returns the number that marks a pixel without a class in a compact map: the dtype's largest."""
  return int(np.iinfo(maps.dtype).max)


def compact(numbers: jax.Array, valid: jax.Array, classes: int) -> jax.Array:
  """Returns class numbers in uint8, or uint16 from 256 classes on; `no_class` where not valid."""
  dtype = jnp.uint8 if classes < 256 else jnp.uint16
  return jnp.where(valid, numbers, jnp.iinfo(dtype).max).astype(dtype)


def thumbnails(maps: Any) -> Any:
  """Returns maps [N, H, W] as they are, and the middle slices of volumes [N, D, H, W]; of large
  ones every second pixel, or every third, ...
  """
  maps = maps[(slice(None), *(size // 2 for size in maps.shape[1:-2]))]
  step = -(-max(maps.shape[1:]) // MAX_PIXELS)
  return maps[(slice(None), *[slice(None, None, step)] * (maps.ndim - 1))]
