"""Stores all values of an output, rounded to a dtype; of a map also at a reduced resolution."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.cache.codecs import output_errors
from distill_jax.cache.codecs.fields import Layout, check_size
from distill_jax.errors import suggest
from distill_jax.losses import resize_logits
from distill_jax.types import Batch

# bfloat16 is stored as its 16 bits: NumPy has no such dtype.
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}

MAX_SPREAD = 200.0  # nats; at temperature 20 a class so far below the peak has 5e-5 of its odds
FAR = 1e4  # nats below the peak; exp(-FAR / temperature) is 0 in float32 up to temperature 96
TOP = 126  # the code of the widest gap is -126; -127 is FAR, and -128 is -inf
MAX_LOGIT_ERROR = 0.25  # nats, of a difference of classes within RELEVANT of the peak
RELEVANT = 20.0  # nats


@dataclasses.dataclass(frozen=True)
class Dense:
  """Codec of logits, features or attention maps [B, ...], rounded to a dtype.

  -inf (a class that does not exist) is decoded as -inf. Rows of logits whose
  differences, within 20 nats of the largest, the dtype rounds by more than 0.25 nats are refused:
  their softmax would be another one.

  Attributes:
    dtype: 'float32'; 'float16' (relative error 2^-11, magnitudes up to 65,504); 'bfloat16' (2^-8);
      'int8', of features with one scale for each row of the last axis (error at most the row's
      largest magnitude / 254). Of logits 'int8' stores how far each is below the row's peak: a gap
      g of the widest gap w <= 200 as 252 sqrt(g / w), error about sqrt(g w) / 252; a wider one,
      such as that of a padded class at -1e9, as 1e4, where the softmax is 0.
    logits: whether rows are logits. None: those of an output whose name is, or ends with, 'logits'.
    size: grid at which maps [B, H, W, C] or [B, D, H, W, C] are stored, such as (H // 4, W // 4);
      `losses.resize_logits` brings them there, and back when they are read. None: as they are.

  Raises:
    ValueError: another dtype; in methods, a size of more pixels than the output's.

  >>> from distill_jax import cache
  >>> logits = jax.ShapeDtypeStruct((1, 1000), jnp.float32)
  >>> {dtype: cache.row_bytes(cache.Dense(dtype), logits) for dtype in ("float16", "int8")}
  {'float16': 2000, 'int8': 1008}
  """

  dtype: str = "float16"
  logits: bool | None = None
  size: tuple[int, ...] | None = None

  def __post_init__(self):
    if self.logits is not None and not isinstance(self.logits, bool):
      raise ValueError(f"logits: expected True, False or None, got {self.logits!r}")
    if self.dtype not in DTYPES:
      hint = suggest(self.dtype, DTYPES)
      raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}{hint}")
    if self.size is not None:
      object.__setattr__(self, "size", check_size(self.size))

  def columns(self, output: Any) -> Layout:
    """Returns the columns of an output, or `ShapeDtypeStruct`, [B, ...]."""
    output_errors.check_output_shape(output, axes=1 + (self.dtype == "int8"))
    if self.size is not None:
      output = jax.eval_shape(self.reduce, output)
    shape = tuple(output.shape[1:])
    layout = {"values": (np.dtype(DTYPES[self.dtype]), shape)}
    if self.dtype == "int8":
      for name in ("scale",) if self.logits is False else ("peak", "spread"):
        layout[name] = (np.dtype(np.float32), shape[:-1])
    return layout

  def encode(self, output: jax.Array, batch: Batch, *, first: Any = 0) -> dict[str, jax.Array]:
    """Returns the columns, each [B, ...]."""
    del batch, first
    output = self.reduce(output)
    if self.dtype == "int8":
      return _encode_features(output) if self.logits is False else _encode_logits(output)
    values = output.astype(self.dtype)
    if self.dtype == "bfloat16":
      values = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return {"values": values}

  def decode(self, columns: Mapping[str, Any], output: Any) -> jax.Array:
    """Returns the output [B, ...] in the shape and dtype of `output`."""
    values = jnp.asarray(columns["values"])
    if self.dtype == "int8":
      values = _decode_features(columns) if self.logits is False else _decode_logits(columns)
    elif self.dtype == "bfloat16":
      values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
    return self.restore(values, output)

  def reduce(self, output: jax.Array) -> jax.Array:
    """Returns the output [B, ...] at the size that is stored.

    Raises:
      ValueError: it is no map of as many axes of space, or a smaller one.
    """
    if self.size is None:
      return output
    if len(self.size) == output.ndim - 2 and any(
      new > old for new, old in zip(self.size, output.shape[1:-1])
    ):
      raise ValueError(
        f"size: expected at most {output.shape[1:-1]} of the output, got {self.size}: leave size "
        "out to store it as it is"
      )
    return resize_logits(output, self.size, name="output")

  def restore(self, values: jax.Array, output: Any) -> jax.Array:
    """Returns stored values in the shape and dtype of `output`."""
    if self.size is not None:
      values = resize_logits(values, output.shape[1:-1], name="output")
    return values.astype(output.dtype)

  def errors(self, output: jax.Array) -> jax.Array:
    """Returns per example, uint8 [B], why it cannot be stored; see `output_errors`."""
    output = self.reduce(output)
    rounded = output.astype("float32" if self.dtype == "int8" else self.dtype)
    overflow = jnp.isfinite(output) & ~jnp.isfinite(rounded)
    if self.logits is not False:
      coarse = _is_coarse(output, rounded)
    elif self.dtype == "int8":
      coarse = _hides_positive(output)
    else:
      coarse = jnp.zeros(output.shape[:1], bool)
    return output_errors.value_errors(output, overflow, coarse)


def _encode_features(output: jax.Array) -> dict[str, jax.Array]:
  x = output.astype(jnp.float32)
  exists = x > -jnp.inf
  scale = jnp.where(exists, jnp.abs(x), 0).max(-1) / 127
  codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
  return {"values": jnp.where(exists, codes, -128).astype(jnp.int8), "scale": scale}


def _decode_features(columns: Mapping[str, Any]) -> jax.Array:
  numbers = columns["values"].astype(jnp.float32) * columns["scale"][..., None]
  return jnp.where(columns["values"] == -128, -jnp.inf, numbers)


def _encode_logits(output: jax.Array) -> dict[str, jax.Array]:
  """Returns the gaps below the peak: code 126 is none, -126 the widest."""
  x = output.astype(jnp.float32)
  exists = x > -jnp.inf
  peak = x.max(-1)
  peak = jnp.where(peak > -jnp.inf, peak, 0)
  gaps = jnp.where(exists, peak[..., None] - x, 0)
  is_far = gaps > MAX_SPREAD
  spread = jnp.where(is_far, 0, gaps).max(-1)
  fractions = gaps / jnp.where(spread > 0, spread, 1)[..., None]
  codes = TOP - jnp.round(2 * TOP * jnp.sqrt(jnp.where(is_far, 0, fractions)))
  codes = jnp.where(is_far, -TOP - 1, codes)
  values = jnp.where(exists, codes, -128).astype(jnp.int8)
  return {"values": values, "peak": peak, "spread": spread}


def _decode_logits(columns: Mapping[str, Any]) -> jax.Array:
  codes = columns["values"].astype(jnp.float32)
  gaps = columns["spread"][..., None] * ((TOP - codes) / (2 * TOP)) ** 2
  gaps = jnp.where(codes == -TOP - 1, FAR, gaps)
  return jnp.where(codes == -128, -jnp.inf, columns["peak"][..., None] - gaps)


def _is_coarse(logits: jax.Array, rounded: jax.Array) -> jax.Array:
  """Returns per example, bool [B], whether rounding changes the odds of a probable class."""
  if logits.ndim < 2:
    return jnp.zeros(logits.shape, bool)
  wide = reduce.common_dtype(logits.dtype, jnp.float32)
  x = jnp.asarray(logits, wide)
  is_relevant = jnp.isfinite(x) & (x.max(-1, keepdims=True) - x < RELEVANT)
  errors = jnp.where(is_relevant, jnp.asarray(rounded, wide) - x, 0)
  highest = jnp.where(is_relevant, errors, -jnp.inf).max(-1)
  lowest = jnp.where(is_relevant, errors, jnp.inf).min(-1)
  return (highest - lowest > MAX_LOGIT_ERROR).reshape(len(x), -1).any(-1)


def _hides_positive(features: jax.Array) -> jax.Array:
  """Returns per example, bool [B], whether a far negative value rounds a positive largest to 0."""
  exists = features > -jnp.inf
  largest = features.max(-1)
  lowest = jnp.where(exists, features, 0).min(-1)
  hidden = (largest > 0) & (-lowest / 254 > largest)
  return hidden.reshape(len(features), -1).any(-1)
