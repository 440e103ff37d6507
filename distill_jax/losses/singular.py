"""A loss on the singular vectors of maps, and how they change from layer to layer."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.losses import _checks


def kdsvd(student: Sequence[ArrayLike], teacher: Sequence[ArrayLike], *, k: int = 1) -> jax.Array:
  """sum (R_s - R_t)^2, R = exp(-(a_ic - b_jc)^2 / 8) between singular vectors of adjacent layers.

  a and b are the k largest right singular vectors of two adjacent maps [H W, C], each times its
  singular value in the teacher over the norm of the k values. Each of the teacher's vectors is
  compared with the one of the student's k + 3 largest that is nearest in direction, up to the
  sign. A singular vector has no sign: here the teacher's largest entry is positive, where
  RepDistiller keeps the sign that LAPACK returns. The gradient between vectors of equal singular
  values is 0.

  Args:
    student: two or more maps, shallow to deep, each [B, ..., H, W, C] of any size.
    teacher: as many maps, each [B, ..., J, K, C] with the channels of the student's.
    k: number >= 1 of singular vectors.

  Returns:
    [B], summed over the pairs of adjacent layers.

  Raises:
    ValueError: fewer than two maps or another number, batch sizes or channels differ, or k < 1.

  Compares: principal directions of maps, between layers
  Shapes: L x [B, ..., H, W, C], L x [B, ..., J, K, C] -> [B]
  Use: convolutional networks, the ends of all stages
  Weight: not published for a mean over the batch
  Source: KDSVD, Lee et al. 2018, arXiv:1807.06819, as in RepDistiller

  >>> x = [jnp.ones((1, 2, 2, 2)), jnp.ones((1, 1, 1, 3))]
  >>> kdsvd(x, [2 * x[0], 3 * x[1]]).round(4)
  Array([0.], dtype=float32)
  """
  k = operator.index(k)
  if k < 1:
    raise ValueError(f"k: expected at least 1, got {k}")
  layers = [_directions(s, t, k) for s, t in _maps(student, teacher)]
  values = [
    ((_kernel(s, shallow_s) - _kernel(t, shallow_t)) ** 2).sum((1, 2, 3))
    for (shallow_s, shallow_t), (s, t) in zip(layers, layers[1:])
  ]
  return sum(values[1:], values[0])


def _maps(
  student: Sequence[ArrayLike], teacher: Sequence[ArrayLike]
) -> list[tuple[jax.Array, jax.Array]]:
  """Returns pairs of maps in one dtype, after a check of their shapes."""
  students, teachers = (
    [_checks.array(name, x, ndim=4) for x in maps]
    for name, maps in (("student", student), ("teacher", teacher))
  )
  shapes = [[(x.shape[0], x.shape[-1]) for x in maps] for maps in (students, teachers)]
  if len(students) < 2 or shapes[0] != shapes[1] or len({batch for batch, _ in shapes[0]}) > 1:
    raise ValueError(
      "student: expected two or more maps of the teacher's batch and channels, got student "
      f"{[x.shape for x in students]} and teacher {[x.shape for x in teachers]}"
    )
  dtype = reduce.common_dtype(*students, *teachers)
  return [(s.astype(dtype), t.astype(dtype)) for s, t in zip(students, teachers)]


def _directions(student: jax.Array, teacher: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the k scaled singular vectors of both sides, the student's aligned: [B, C, k]."""
  _, s = _right_singular(student, k + 3)
  values, t = _right_singular(teacher, k)
  largest = jnp.take_along_axis(t, jnp.abs(t).argmax(1, keepdims=True), 1)
  t = t * jnp.sign(largest)
  cosines = jnp.einsum("bcn,bck->bnk", s, t, precision=_checks.HIGHEST)
  nearest = jnp.abs(cosines).argmax(1, keepdims=True)
  sign = jnp.sign(jnp.take_along_axis(cosines, nearest, 1))
  s = jnp.take_along_axis(s, nearest, 2) * sign
  values = _checks.unit(values)[:, None, :]
  return s * values, t * values


def _right_singular(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the largest singular values [B, n], up to a factor, and vectors [B, C, n]."""
  x = _checks.positions(x)
  # The factor cancels, so that stop_gradient loses nothing.
  peak = jax.lax.stop_gradient(jnp.abs(x).max((1, 2), keepdims=True))
  x = x / jnp.where(peak > 0, peak, 1)
  squares, vectors = _eigh(jnp.einsum("bpc,bpd->bcd", x, x, precision=_checks.HIGHEST))
  return _checks.root(squares[:, :count]), vectors[:, :, :count]


@jax.custom_jvp
def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns eigenvalues [B, C], largest first, and eigenvectors [B, C, C]."""
  values, vectors = jnp.linalg.eigh(gram)
  return values[:, ::-1], vectors[:, :, ::-1]


@_eigh.defjvp
def _eigh_jvp(primals, tangents):
  """As jax's derivative, but 0 instead of infinite between vectors of equal eigenvalues."""
  values, vectors = _eigh(*primals)
  inner = jnp.einsum("bci,bcd,bdj->bij", vectors, *tangents, vectors, precision=_checks.HIGHEST)
  gap = values[:, None, :] - values[:, :, None]
  apart = jnp.abs(gap) > 8 * jnp.finfo(values.dtype).eps * jnp.abs(values).max(-1)[:, None, None]
  turn = jnp.where(apart, inner / jnp.where(apart, gap, 1), 0)
  moved = jnp.einsum("bci,bij->bcj", vectors, turn, precision=_checks.HIGHEST)
  return (values, vectors), (jnp.einsum("bii->bi", inner), moved)


def _kernel(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns exp(-(a_ic - b_jc)^2 / 8), [B, C, D, k]."""
  return jnp.exp(-((a[:, :, None, :] - b[:, None, :, :]) ** 2) / 8)
