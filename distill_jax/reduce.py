"""Computes means of valid rows, as (sum, count) pairs that merge over steps, hosts and devices.

Blank the invalid rows before a loss, and take the mean of the valid values after it:

>>> from distill_jax import losses
>>> where = jnp.array([True, False])
>>> student, teacher = blank(where, jnp.ones((2, 3)), jnp.array([[1., 2., 3.], [jnp.nan] * 3]))
>>> mean(losses.kl_divergence(student, teacher), where).round(4)
Array(0.2662, dtype=float32)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import compat

Pair = tuple[jax.Array, jax.Array]


def blank(where: jax.Array | None, *trees: Any) -> Any:
  """Returns the trees with 0 in the masked rows of every float array, before a loss reads them.

  `mean` alone keeps a masked NaN or infinity out of the value, but not out of the gradient: the
  derivative of most losses is NaN there, and 0 times NaN is NaN. A blanked row's gradient is 0.
  Blank the batch as well (`batch = blank(where, batch)`) where a network reads masked rows.

  Args:
    where: valid rows, bool, a prefix of the shape of every float array: `[B]` masks the rows of
      `[B, T, C]`. None: all are valid.
    *trees: arrays, or trees of arrays such as `losses.SparseTargets`. Integers stay as they are.

  Returns:
    The tree, or a tuple where several are given.

  Raises:
    ValueError: `where` is not a prefix of the shape of a float array, or is not bool.

  >>> blank(jnp.array([True, False]), jnp.array([[1., 2.], [jnp.nan, jnp.inf]]))
  Array([[1., 2.],
         [0., 0.]], dtype=float32)
  """

  def leaf(x: Any) -> Any:
    if where is None or not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      return x
    x = jnp.asarray(x)
    return jnp.where(_broadcast(jnp.asarray(where), x.shape), x, jnp.zeros_like(x))

  blanked = jax.tree.map(leaf, trees)
  return blanked[0] if len(trees) == 1 else blanked


def total(values: jax.Array, where: jax.Array | None = None, *, axis_name=None) -> Pair:
  """Returns sum and number of the valid values.

  Args:
    values: any shape; summed in float32 or wider.
    where: bool, a prefix of the shape of `values`: `[B]` masks the rows of `[B, T]`. None: all are
      valid. Masked values may be NaN or infinite: they do not reach the value. Their gradient
      is 0, which times the infinite derivative of a loss is NaN: `blank` the loss's inputs.
    axis_name: mapped axis to sum over in addition (`pmap`, `shard_map`); None: no axis.

  Returns:
    `(sum, count)`, float32 scalars (float64 if the values are).

  Raises:
    ValueError: `where` is not a prefix of the shape of `values`, or is not bool.
  """
  values = jnp.asarray(values)
  dtype = common_dtype(values.dtype, jnp.float32)
  values = values.astype(dtype)
  if where is None:
    pair = values.sum(), jnp.asarray(values.size, dtype)
  else:
    where = _broadcast(jnp.asarray(where), values.shape)
    pair = jnp.where(where, values, 0).sum(), where.sum(dtype=dtype)
  return pair if axis_name is None else compat.psum(pair, axis_name)


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


def common_dtype(*dtypes: Any) -> jnp.dtype:
  """Returns the dtype that arrays of these dtypes are cast to before they meet.

  The cast is explicit, so it is allowed under `jax_numpy_dtype_promotion="strict"` too, where
  `jnp.promote_types` raises.
  """
  with jax.numpy_dtype_promotion("standard"):
    return jnp.result_type(*dtypes)


def _broadcast(where: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  if where.dtype != jnp.bool_:
    raise ValueError(f"where: expected bool, got {where.dtype}: write `where=mask > 0`")
  if where.shape != shape[: where.ndim]:
    raise ValueError(
      f"where: expected a prefix of the values' shape {shape}, got {where.shape}: expand it"
    )
  return jnp.broadcast_to(where.reshape(where.shape + (1,) * (len(shape) - where.ndim)), shape)
