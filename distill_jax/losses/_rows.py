"""Gathers the rows of a batch from all devices and sets the invalid ones to 0.

Losses that relate rows start from these."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from distill_jax.losses import _checks


def gather(
  *arrays: jax.Array, where: ArrayLike | None = None, axis_name: str | None = None
) -> tuple[jax.Array, ...]:
  """Returns the rows of every device of `axis_name`, invalid ones set to 0, and `where` last.

  A loss of gathered rows is the same global scalar on every device. Its gradient by a device's copy
  of the parameters is the part of that device's rows times the number of devices, so `pmean` of the
  gradients is the gradient of the scalar.

  Args:
    *arrays: [B, ...] each.
    where: valid rows, bool [B]; None: all. Masked rows may be NaN.
    axis_name: a mapped axis of `pmap` or `shard_map`, or None.

  Raises:
    ValueError: `where` is not bool or not [B].
  """
  mask = valid(where, arrays[0].shape[0])
  rows = (*(jnp.where(column(mask, x.ndim), x, jnp.zeros_like(x)) for x in arrays), mask)
  if axis_name is None:
    return rows
  return tuple(jax.lax.all_gather(x, axis_name, tiled=True) for x in rows)


def check_several(student: jax.Array) -> None:
  """Raises ValueError where a batch has one row, which has no other to be related to."""
  if student.shape[0] < 2:
    raise ValueError(
      f"student: expected at least 2 rows, which the loss relates, got shape {student.shape}: take "
      "a larger batch, or axis_name= where each device has one row"
    )


def valid(where: ArrayLike | None, size: int) -> jax.Array:
  """Returns `where` as bool [size]; None: all rows are valid."""
  where = jnp.ones(size, bool) if where is None else jnp.asarray(where)
  if where.dtype != jnp.bool_ or where.shape != (size,):
    raise ValueError(
      f"where: expected bool ({size},), one value a row, got {where.dtype} {where.shape}"
    )
  return where


def column(where: jax.Array, ndim: int) -> jax.Array:
  """Returns `where` [B] as [B, 1, ...] with `ndim` axes."""
  return where.reshape(where.shape + (1,) * (ndim - 1))


def flat(x: jax.Array) -> jax.Array:
  """Flattens each row: [B, ...] -> [B, D]."""
  return x.reshape(x.shape[0], -1)


def gram(x: jax.Array) -> jax.Array:
  """Returns x x', in full precision."""
  return jnp.matmul(x, x.T, precision=_checks.HIGHEST)


def count(where: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Returns the number of valid rows, at least 1, as a denominator."""
  return jnp.maximum(where.sum(dtype=dtype), 1)


def moments(x: jax.Array, where: jax.Array, ddof: int = 0) -> tuple[jax.Array, jax.Array]:
  """Returns x minus its mean per channel (0 in invalid rows), and the variance [1, ..., 1, C].

  Both moments are over the valid rows and over space.

  Args:
    x: [B, ..., C], 0 in invalid rows.
    where: valid rows [B].
    ddof: 1 divides by the number of values - 1.
  """
  axes = tuple(range(x.ndim - 1))
  size = where.sum(dtype=x.dtype) * (x[0, ..., 0].size)
  mean = x.sum(axes, keepdims=True) / jnp.maximum(size, 1)
  centered = jnp.where(column(where, x.ndim), x - mean, 0)
  return centered, (centered**2).sum(axes, keepdims=True) / jnp.maximum(size - ddof, 1)


def push(
  queue: jax.Array, first: jax.Array, rows: jax.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Writes the valid rows in place of the oldest ones of a ring.

  Args:
    queue: [N, ...].
    first: position of its oldest row, an integer.
    rows: [M, ...].
    where: valid rows, bool [M].

  Returns:
    The queue, and the position of its oldest row.
  """
  order = jnp.cumsum(where, dtype=first.dtype) - 1
  written = where.sum(dtype=first.dtype)
  # Of more rows than the queue holds, only the last: a position that is written twice could hold
  # either row (on a GPU).
  is_last = where & (order >= written - len(queue))
  position = jnp.where(is_last, (first + order) % len(queue), len(queue))
  queue = queue.at[position].set(rows.astype(queue.dtype), mode="drop")
  return queue, (first + written) % len(queue)


def mean(x: jax.Array, where: jax.Array, axis_name: str | None) -> jax.Array:
  """Returns the mean over the valid rows of all devices, 0 without any."""
  values = jnp.where(column(where, x.ndim), x, 0).sum(0)
  values = values if axis_name is None else jax.lax.psum(values, axis_name)
  return values / jnp.maximum(total(where, axis_name), 1).astype(values.dtype)


def total(where: jax.Array, axis_name: str | None) -> jax.Array:
  """Returns the number of valid rows of all devices."""
  number = where.sum()
  return number if axis_name is None else jax.lax.psum(number, axis_name)
