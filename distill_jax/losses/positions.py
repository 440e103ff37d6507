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
  Source: Affinity distillation, He et al. 2019, section 3.3, arXiv:1903.04688

  >>> affinity(jnp.array([[[1.], [2.]]]), jnp.array([[[1., 0.], [0., 1.]]]))
  Array([1.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=3, leading=max(jnp.ndim(student) - 1, 1))
  s, t = (_cosines(x) for x in (student, teacher))
  return _checks.root(((s - t) ** 2).sum(-1)).sum(-1) / s.shape[-1]


def _cosines(x: jax.Array) -> jax.Array:
  """Returns the cosines between all pairs of positions of x [B, ..., C], [B, P, P]."""
  unit = _checks.unit(x.reshape(x.shape[0], -1, x.shape[-1]))
  return jnp.einsum("bpc,bqc->bpq", unit, unit, precision=_checks.HIGHEST)
