"""Stores integers: cluster ids of a layer's frames, or numbers of valid frames."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs import output_errors
from distill_jax.cache.codecs.fields import Layout
from distill_jax.errors import check_integer
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Codes:
  """Codec of integers [B, ...] from 0 to num_codes - 1, in 1, 2 or 4 bytes each.

  Of a teacher with `teachers.with_codes`, whose codebook is among its weights: a cache of another
  codebook is another teacher's. Of 'lengths', the numbers of valid frames of T, `Codes(T + 1)`.

  Attributes:
    num_codes: number of values, 1 to 2^31.

  Raises:
    ValueError: num_codes outside its range; in methods, an output that is not of integers.

  >>> from distill_jax import cache
  >>> codes = jax.ShapeDtypeStruct((1, 500, 2), jnp.int32)  # 500 frames, two codebooks
  >>> cache.row_bytes(cache.Codes(256), codes), cache.row_bytes(cache.Codes(2000), codes)
  (1000, 2000)
  """

  num_codes: int

  def __post_init__(self):
    object.__setattr__(self, "num_codes", check_integer("num_codes", self.num_codes, 1, 2**31))

  def columns(self, output: Any) -> Layout:
    """Returns the column of an output, or `ShapeDtypeStruct`, [B, ...]."""
    if not jnp.issubdtype(output.dtype, jnp.integer) or 0 in output.shape[1:]:
      raise ValueError(
        f"output: expected integers, rows first, none empty; got {output.dtype} "
        f"{tuple(output.shape)}: store floating values with Dense"
      )
    return {"values": (np.dtype(self._dtype), tuple(output.shape[1:]))}

  def encode(self, output: jax.Array, batch: Batch, *, first: Any = 0) -> dict[str, jax.Array]:
    """Returns the column [B, ...]."""
    del batch, first
    self.columns(output)
    return {"values": output.astype(self._dtype)}

  def decode(self, columns: Mapping[str, Any], output: Any) -> jax.Array:
    """Returns the integers [B, ...] in the shape and dtype of `output`."""
    return jnp.asarray(columns["values"]).astype(output.dtype)

  def errors(self, output: jax.Array) -> jax.Array:
    """Returns per example, uint8 [B], why it cannot be stored; see `output_errors`."""
    return output_errors.integer_errors(output, self.num_codes)

  @property
  def _dtype(self) -> type:
    sizes = {2**8: np.uint8, 2**16: np.uint16, 2**31: np.uint32}
    return next(dtype for size, dtype in sizes.items() if self.num_codes <= size)
