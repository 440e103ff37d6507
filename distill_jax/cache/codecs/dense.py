"""How one output of a teacher is kept: whole, as its k most probable classes, or as k draws.

A codec turns an output [B, ...] into small columns and back. `encode` belongs inside the teacher's jit, so that only
the columns leave the device; `decode` inside the train step. The last axis is the one of classes (or channels);
those between it and the first are tokens or pixels, each kept by itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs import faults
from distill_jax.cache.codecs.sparse import Layout, RandomSampling, TopK
from distill_jax.errors import suggest
from distill_jax.types import Batch

# bfloat16 is kept as its 16 bits: NumPy has no such dtype.
DENSE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


@dataclasses.dataclass(frozen=True)
class Dense:
  """Logits, features or attention maps as they are, [B, ...], rounded to a dtype.

  -inf (a class that does not exist) comes back as -inf.

  Attributes:
    dtype: 'float32'; 'float16' (relative error 2^-11, magnitudes up to 65,504); 'bfloat16' (2^-8); 'int8', with
      one scale for each row of the last axis (error at most the row's largest magnitude / 254).

  Raises:
    ValueError: another dtype.
  """

  dtype: str = "float16"

  def __post_init__(self):
    if self.dtype not in DENSE:
      raise ValueError(f"dtype: {self.dtype!r} is none of those kept{suggest(self.dtype, DENSE)}")

  def columns(self, output) -> Layout:
    """The columns of an output of this shape and dtype [B, ...]; a `ShapeDtypeStruct` will do."""
    faults.check_output(output, axes=1 + (self.dtype == "int8"))
    rows = tuple(output.shape[1:])
    layout = {"values": (np.dtype(DENSE[self.dtype]), rows)}
    return layout | ({"scale": (np.dtype(np.float32), rows[:-1])} if self.dtype == "int8" else {})

  def encode(self, output, batch: Batch, *, first=0) -> dict[str, jax.Array]:
    """The columns, each [B, ...]."""
    del batch, first
    if self.dtype == "int8":
      x = output.astype(jnp.float32)
      exists = x > -jnp.inf
      scale = jnp.where(exists, jnp.abs(x), 0).max(-1) / 127
      codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
      return {"values": jnp.where(exists, codes, -128).astype(jnp.int8), "scale": scale}
    values = output.astype(self.dtype)
    return {
      "values": jax.lax.bitcast_convert_type(values, jnp.uint16)
      if self.dtype == "bfloat16"
      else values
    }

  def decode(self, columns: Mapping[str, Any], output) -> jax.Array:
    """The output [B, ...] in its own dtype."""
    values = columns["values"]
    if self.dtype == "int8":
      values = jnp.where(values == -128, -jnp.inf, values * columns["scale"][..., None])
    elif self.dtype == "bfloat16":
      values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
    return values.astype(output.dtype)

  def faults(self, output) -> jax.Array:
    """Per example [B], uint8, what keeps it from being kept; see `faults.check`."""
    kept = output.astype("float32" if self.dtype == "int8" else self.dtype)
    return faults.of_numbers(output, jnp.isfinite(output) & ~jnp.isfinite(kept))


Codec = Dense | TopK | RandomSampling


def output_of(name: str) -> str:
  """The teacher's output that is kept under a name: what stands before '@', so that one may be kept in several ways.

  >>> output_of("logits@top8")
  'logits'
  """
  return name.partition("@")[0]


def spec(codec: Codec) -> dict[str, Any]:
  """The codec as plain values, for a cache's identity."""
  return {"codec": type(codec).__name__} | dataclasses.asdict(codec)


def from_spec(values: Mapping[str, Any]) -> Codec:
  """The codec that `spec` described.

  Raises:
    ValueError: no such codec, a field that it does not have or lacks, or a value outside its range.
  """
  kinds = {kind.__name__: kind for kind in (Dense, TopK, RandomSampling)}
  name = values.get("codec")
  if name not in kinds:
    raise ValueError(f"codec: there is no {name!r}{suggest(str(name), kinds)}")
  fields = {field: value for field, value in values.items() if field != "codec"}
  known = [field.name for field in dataclasses.fields(kinds[name])]
  if set(fields) != set(known):
    raise ValueError(f"codec {name}: expected the fields {known}, got {sorted(fields)}")
  return kinds[name](**fields)
