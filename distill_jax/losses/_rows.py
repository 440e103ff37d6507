"""The rows of a batch, of all devices, with the invalid ones blank: what relational losses start from."""

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks


def gather(*arrays: jax.Array, where=None, axis_name=None) -> tuple[jax.Array, ...]:
  """The rows of every device of `axis_name`, invalid ones set to 0, and `where` last.

  A loss of gathered rows is the same global scalar on every device. Its gradient by a device's own copy of the
  parameters holds the part of that device's rows times the number of devices, so `pmean` of the gradients is
  the gradient of the scalar.

  Args:
    *arrays: [B, ...] each.
    where: valid rows, bool [B]; None: all. What is masked may be NaN.
    axis_name: a mapped axis of `pmap` or `shard_map`, or None.

  Raises:
    ValueError: `where` is not bool or not [B].
  """
  where = valid(where, arrays[0].shape[0])
  blank = [jnp.where(column(where, x.ndim), x, jnp.zeros_like(x)) for x in arrays]
  if axis_name is not None:
    *blank, where = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (*blank, where))
  return (*blank, where)


def valid(where, size: int) -> jax.Array:
  """`where` as bool [size]; None: all rows are valid."""
  where = jnp.ones(size, bool) if where is None else jnp.asarray(where)
  if where.dtype != jnp.bool_ or where.shape != (size,):
    raise ValueError(
      f"where must be bool ({size},), one value a row, got {where.dtype} {where.shape}"
    )
  return where


def column(where: jax.Array, ndim: int) -> jax.Array:
  """`where` [B] as [B, 1, ...] with `ndim` axes."""
  return where.reshape(where.shape + (1,) * (ndim - 1))


def flat(x: jax.Array) -> jax.Array:
  """[B, ...] -> [B, D]."""
  return x.reshape(x.shape[0], -1)


def gram(x: jax.Array) -> jax.Array:
  """x x', in full precision."""
  return jnp.matmul(x, x.T, precision=_checks.HIGHEST)


def count(where: jax.Array, dtype) -> jax.Array:
  """How many rows are valid, at least 1: a denominator."""
  return jnp.maximum(where.sum(dtype=dtype), 1)


def moments(x: jax.Array, where: jax.Array, ddof=0) -> tuple[jax.Array, jax.Array]:
  """Per channel over valid rows and space: x minus its mean (0 in invalid rows), and the variance [C].

  Args:
    x: [B, ..., C], 0 in invalid rows.
    where: valid rows [B].
    ddof: 1 divides by the number of values - 1.
  """
  axes = tuple(range(x.ndim - 1))
  size = where.sum(dtype=x.dtype) * (x[0, ..., 0].size)
  mean = x.sum(axes) / jnp.maximum(size, 1)
  centered = jnp.where(column(where, x.ndim), x - mean, 0)
  return centered, (centered**2).sum(axes) / jnp.maximum(size - ddof, 1)
