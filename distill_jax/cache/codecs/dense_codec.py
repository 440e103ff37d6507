"""Stores all values of an output, rounded to a dtype."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs import output_errors
from distill_jax.cache.codecs.fields import Layout
from distill_jax.errors import suggest
from distill_jax.types import Batch

# bfloat16 is stored as its 16 bits: NumPy has no such dtype.
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


@dataclasses.dataclass(frozen=True)
class Dense:
  """Codec of logits, features or attention maps [B, ...], rounded to a dtype.

  -inf (a class that does not exist) is decoded as -inf.

  Attributes:
    dtype: 'float32'; 'float16' (relative error 2^-11, magnitudes up to 65,504); 'bfloat16' (2^-8);
      'int8', with one scale for each row of the last axis (error at most the row's largest
      magnitude / 254).

  Raises:
    ValueError: another dtype.
  """

  dtype: str = "float16"

  def __post_init__(self):
    if self.dtype not in DTYPES:
      hint = suggest(self.dtype, DTYPES)
      raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}{hint}")

  def columns(self, output: Any) -> Layout:
    """Returns the columns of an output, or `ShapeDtypeStruct`, [B, ...]."""
    output_errors.check_output_shape(output, axes=1 + (self.dtype == "int8"))
    shape = tuple(output.shape[1:])
    layout = {"values": (np.dtype(DTYPES[self.dtype]), shape)}
    if self.dtype == "int8":
      layout["scale"] = (np.dtype(np.float32), shape[:-1])
    return layout

  def encode(self, output: jax.Array, batch: Batch, *, first: Any = 0) -> dict[str, jax.Array]:
    """Returns the columns, each [B, ...]."""
    del batch, first
    if self.dtype == "int8":
      return _encode_int8(output)
    values = output.astype(self.dtype)
    if self.dtype == "bfloat16":
      values = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return {"values": values}

  def decode(self, columns: Mapping[str, Any], output: Any) -> jax.Array:
    """Returns the output [B, ...] in the shape and dtype of `output`."""
    values = columns["values"]
    if self.dtype == "int8":
      numbers = values.astype(jnp.float32) * columns["scale"][..., None]
      values = jnp.where(values == -128, -jnp.inf, numbers)
    elif self.dtype == "bfloat16":
      values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
    return values.astype(output.dtype)

  def errors(self, output: jax.Array) -> jax.Array:
    """Returns per example, uint8 [B], why it cannot be stored; see `output_errors`."""
    rounded = output.astype("float32" if self.dtype == "int8" else self.dtype)
    overflow = jnp.isfinite(output) & ~jnp.isfinite(rounded)
    return output_errors.value_errors(output, overflow)


def _encode_int8(output: jax.Array) -> dict[str, jax.Array]:
  x = output.astype(jnp.float32)
  exists = x > -jnp.inf
  scale = jnp.where(exists, jnp.abs(x), 0).max(-1) / 127
  codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
  return {"values": jnp.where(exists, codes, -128).astype(jnp.int8), "scale": scale}
