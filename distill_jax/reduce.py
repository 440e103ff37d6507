"""Computes means of valid rows, as (sum, count) pairs that merge over steps, hosts and devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def total(values: jax.Array, where: jax.Array | None = None, *, axis_name=None) -> Pair:
  """Returns sum and number of the valid values.

  Args:
    values: any shape; summed in float32 or wider.
    where: bool, a prefix of the shape of `values`: `[B]` masks the rows of `[B, T]`. None: all are
      valid. Masked values may be NaN or infinite: they reach neither value nor gradient.
    axis_name: mapped axis to sum over in addition (`pmap`, `shard_map`); None: no axis.

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
    where = _broadcast(jnp.asarray(where), values.shape)
    pair = jnp.where(where, values, 0).sum(), where.sum(dtype=dtype)
  return pair if axis_name is None else jax.lax.psum(pair, axis_name)


def mean(values: jax.Array, where: jax.Array | None = None, *, axis_name=None) -> jax.Array:
  """Returns the sum of the valid values over their number; 0 if none is valid.

  The result does not depend on padding, on the sharding or on the number of devices. Arguments,
  units and errors are those of `total`.

  >>> mean(jnp.array([1., 2., jnp.nan]), jnp.array([True, True, False]))
  Array(1.5, dtype=float32)
  """
  return value(total(values, where, axis_name=axis_name))


def merge(*metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sum of metrics of several steps or hosts; each entry is any tree of sums."""
  if not metrics:
    return {}
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *map(dict, metrics))


def value(pair: Pair) -> jax.Array:
  """Returns the mean of a `(sum, count)` pair; 0 for an empty one."""
  pair_sum, count = pair
  return jnp.where(count > 0, pair_sum / jnp.where(count > 0, count, 1), 0)


def _broadcast(where: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  if where.dtype != jnp.bool_:
    raise ValueError(f"where: expected bool, got {where.dtype}: write `where=mask > 0`")
  if where.shape != shape[: where.ndim]:
    raise ValueError(
      f"where: expected a prefix of the values' shape {shape}, got {where.shape}: expand it"
    )
  return jnp.broadcast_to(where.reshape(where.shape + (1,) * (len(shape) - where.ndim)), shape)
