"""Means over valid rows, and (sum, count) pairs that stay exact across steps, hosts and devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def total(values: jax.Array, where: jax.Array | None = None, *, axis_name=None) -> Pair:
  """Sum and number of the valid values.

  Args:
    values: any shape; summed in float32 or wider.
    where: bool, of a shape that broadcasts to `values` from the left: `[B]` masks the rows of `[B, T]`.
      None: all are valid. What is masked may be NaN or infinite: it reaches neither value nor gradient.
    axis_name: sum over this mapped axis too (`pmap`, `shard_map`).

  Returns:
    `(sum, count)`, float32 scalars (float64 if the values are).

  Raises:
    ValueError: `where` is not a prefix of the shape of `values`, or is not bool.
  """
  values = jnp.asarray(values)
  dtype = jnp.promote_types(values.dtype, jnp.float32)
  values = values.astype(dtype)
  if where is None:
    pair = values.sum(), jnp.asarray(values.size, dtype)
  else:
    where = _spread(jnp.asarray(where), values.shape)
    pair = jnp.where(where, values, 0).sum(), where.sum(dtype=dtype)
  return pair if axis_name is None else jax.lax.psum(pair, axis_name)


def mean(values: jax.Array, where: jax.Array | None = None, *, axis_name=None) -> jax.Array:
  """Sum of the valid values over their number; 0 where none is valid.

  The result does not depend on padding, on the sharding or on the number of devices. Arguments, units and
  errors as in `total`.

  >>> mean(jnp.array([1., 2., jnp.nan]), jnp.array([True, True, False]))
  Array(1.5, dtype=float32)
  """
  return value(total(values, where, axis_name=axis_name))


def merge(*metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Add metrics of several steps or hosts entry by entry (an entry is any tree of sums)."""
  if not metrics:
    return {}
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *map(dict, metrics))


def value(pair: Pair) -> jax.Array:
  """The mean that a `(sum, count)` pair stands for; 0 for an empty one."""
  pair_sum, count = pair
  return jnp.where(count > 0, pair_sum / jnp.where(count > 0, count, 1), 0)


def _spread(where: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  if where.dtype != jnp.bool_:
    raise ValueError(f"where must be bool, got {where.dtype}: write `where=mask > 0`")
  if where.shape != shape[: where.ndim]:
    raise ValueError(f"where {where.shape} is not the beginning of the values' shape {shape}")
  return jnp.broadcast_to(where.reshape(where.shape + (1,) * (len(shape) - where.ndim)), shape)
