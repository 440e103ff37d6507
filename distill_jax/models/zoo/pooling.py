"""Pools maps by maxima whose gradient is fast on every backend."""

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array) -> jax.Array:
  """Returns the largest value of each 2x2 patch of a map [B, H, W, C], without overlap.

  It reshapes and takes the maximum, because the gradient of `nnx.max_pool` (select-and-scatter) is
  slow on a CPU. Values are those of `nnx.max_pool(x, (2, 2), (2, 2))`, and so are gradients, except
  that equal maxima of a patch share theirs where `nnx.max_pool` gives it to the first. NaN counts
  as equal to all, and the value is NaN then.

  An odd last row or column is dropped (padding "VALID"). An axis of length 1 stays, so that no map
  vanishes.

  Args:
    x: [B, H, W, C].

  Returns:
    [B, max(1, H // 2), max(1, W // 2), C].
  """
  batch, height, width, channels = x.shape
  high = min(2, height)
  wide = min(2, width)
  rows = height // high
  columns = width // wide
  patches = x[:, : rows * high, : columns * wide].reshape(
    batch, rows, high, columns, wide, channels
  )
  return _largest(patches)


@jax.custom_jvp
def _largest(patches: jax.Array) -> jax.Array:
  """Returns the maxima [B, H, W, C] of patches [B, H, 1 or 2, W, 1 or 2, C]."""
  return patches.max((2, 4))


# The derivative of `max` compares each value with the maximum and divides by the number of equal
# ones. XLA on CPU may compute the two sides separately, fused with earlier operations and rounded
# differently: then none is equal. Of a pair, at least one is not smaller, however both are rounded.
@_largest.defjvp
def _largest_jvp(primals, tangents):
  (patches,), (tangent,) = primals, tangents
  in_row, count = _maxima(patches, jnp.ones_like(patches), 4)
  rows, count = _maxima(patches.max(4, keepdims=True), count, 2)
  return _largest(patches), jnp.where(in_row & rows, tangent, 0).sum((2, 4)) / count.squeeze((2, 4))


def _maxima(x: jax.Array, counts: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """Returns which of each pair along an axis is the larger, and the sum of the larger ones' counts.

  Both are the larger if they are equal or one is NaN.
  """
  if x.shape[axis] == 1:
    return jnp.ones_like(x, bool), counts
  first, second = jnp.split(x, 2, axis)
  one, other = jnp.split(counts, 2, axis)
  count = jnp.where(first > second, one, jnp.where(first < second, other, one + other))
  return jnp.concatenate([~(first < second), ~(first > second)], axis), count
