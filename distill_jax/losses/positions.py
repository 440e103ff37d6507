"""Losses that relate the positions of one map to one another, so that widths may differ."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks


def affinity(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """sum_i |A_s,i - A_t,i|_2, A_ij the cosine between positions i and j over their number.

  torchdistill instead sums, over the channels, the norms of the differences between outer
  products of each channel's map over its norm.

  Args:
    student: maps [B, ..., C], such as [B, H, W, C] or [B, length, C].
    teacher: maps [B, ..., D].

  Returns:
    [B].

  Raises:
    ValueError: an axis before the last differs (pool the larger map first), or fewer than 3 axes.

  Compares: similarities between all positions of a map
  Shapes: [B, H, W, C], [B, H, W, D] -> [B]
  Use: segmentation, where the student lacks long-range context
  Weight: 1
  Source: Affinity distillation, He et al. 2019, arXiv:1903.04688

  >>> affinity(jnp.array([[[1.], [2.]]]), jnp.array([[[1., 0.], [0., 1.]]]))
  Array([1.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=3, leading=max(jnp.ndim(student) - 1, 1))
  s, t = (_cosines(x) for x in (student, teacher))
  return _checks.root(((s - t) ** 2).sum(-1)).sum(-1) / s.shape[-1]


def pairwise_similarity(student: ArrayLike, teacher: ArrayLike, *, pool: float = 0.5) -> jax.Array:
  """<(A_s - A_t)^2>, A_ij the cosine between patches i and j, each the maximum over its positions.

  The patches do not overlap; those at the far edges may be smaller. The paper averages over a
  patch; its code, and later ones, take the maximum, with two patches a side. Its code also holds
  the norms constant in the gradient.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].
    pool: side of a patch over that of the map, in [0, 1], rounded down to positions; 0 compares
      all pairs of positions: (H W)^2 values per example.

  Returns:
    [B].

  Raises:
    ValueError: an axis before the last differs (pool the larger map first), or pool outside [0, 1].

  Compares: similarities between the parts of an image
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D] -> [B]
  Use: segmentation, at the last feature map
  Weight: 1
  Source: Structured KD, Liu et al. 2019, arXiv:1903.04197

  >>> student, teacher = jnp.ones((1, 1, 2, 1)), jnp.array([[[[1., 0.], [0., 1.]]]])
  >>> pairwise_similarity(student, teacher)
  Array([0.5], dtype=float32)
  """
  _checks.number("pool", pool, jnp.float32, low=0, high=1)
  s, t = (_cosines(_patches(x, pool)) for x in _checks.maps(student, teacher))
  return ((s - t) ** 2).mean((1, 2))


def _patches(x: jax.Array, pool: float) -> jax.Array:
  """Returns the maximum of each patch of x [B, ..., C]."""
  sizes = (1, *(max(1, int(pool * size)) for size in x.shape[1:-1]), 1)
  padding = [(0, -size % patch) for size, patch in zip(x.shape, sizes)]
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, sizes, sizes, padding)


def _cosines(x: jax.Array) -> jax.Array:
  """Returns the cosines between all pairs of positions of x [B, ..., C], [B, P, P]."""
  unit = _checks.unit(_checks.positions(x))
  return jnp.einsum("bpc,bqc->bpq", unit, unit, precision=_checks.HIGHEST)
