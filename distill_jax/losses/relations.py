"""Losses that relate the rows of a batch by their features: a scalar for the batch of all devices.

student [B, ...] and teacher [B, ...] are flattened per row and may differ in width: no projection
is needed. `where` marks the valid rows, and a mean over pairs is over pairs of valid rows. Under
`pmap` or `shard_map` pass `axis_name=`: every device then returns the scalar of the global batch,
and `pmean` of the gradients is its gradient.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.losses import _checks, _rows
from distill_jax.losses._checks import Scalar


def similarity_preserving(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Squared Frobenius norm of G_s - G_t over B^2; G = F F' with its rows over their L2 norm.

  Not the L1 norm, which torchdistill 1.1.5 takes: it weighs large batches far less.

  Args:
    student: features [B, ...].
    teacher: features [B, ...], any width.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: batch sizes differ.

  Compares: which examples activate alike
  Shapes: [B, ...], [B, ...] -> scalar
  Use: teacher and student of different families
  Weight: 3000
  Source: SP, Tung & Mori 2019, equation 4, arXiv:1907.09682

  >>> similarity_preserving(jnp.eye(2), jnp.ones((2, 1))).round(4)
  Array(0.2929, dtype=float32)
  """
  student, teacher, where = flat_rows(student, teacher, where, axis_name)
  s, t = (_checks.unit(_rows.gram(x)) for x in (student, teacher))
  return ((s - t) ** 2).sum() / _rows.count(where, s.dtype) ** 2


def rkd_distance(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Mean over B^2 entries of the smooth L1 between pairwise distances, each side over its mean.

  The entries include the diagonal. The mean distance of a side is over all pairs i != j, equal rows
  included, as in the paper; its code counts them as 1e-6. Distances are computed from a Gram matrix
  of centered rows: those below its rounding error count as 0.

  Args:
    student: embeddings [B, ...].
    teacher: embeddings [B, ...], any width.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: batch sizes differ.

  Compares: relative distances between examples
  Shapes: [B, ...], [B, ...] -> scalar
  Use: embeddings and penultimate features
  Weight: 25
  Source: RKD, Park et al. 2019, arXiv:1904.05068

  >>> x = jnp.array([[0.], [1.], [3.]])
  >>> rkd_distance(x, 2 * x)
  Array(0., dtype=float32)
  """
  student, teacher, where = flat_rows(student, teacher, where, axis_name)
  count = _rows.count(where, student.dtype)
  s, t = (
    _scaled(_checks.root(geometry(x, where)[1]), count * (count - 1)) for x in (student, teacher)
  )
  return _checks.smooth_l1(s - t).sum() / count**2


def rkd_angle(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Mean over B^3 triplets of the smooth L1 between cosines, cos(e_j - e_i, e_k - e_i).

  Computed from Gram matrices, a few anchors i at a time: B^3 values are never in memory (at B = 512
  the reference code holds 0.5 GB a side). A side of length 0 gives cosine 0.

  Args:
    student: embeddings [B, ...].
    teacher: embeddings [B, ...], any width.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: batch sizes differ.

  Compares: angles between triplets of examples
  Shapes: [B, ...], [B, ...] -> scalar
  Use: embeddings and penultimate features, together with rkd_distance
  Weight: 50
  Source: RKD, Park et al. 2019, arXiv:1904.05068

  >>> x = jnp.array([[0., 0.], [1., 0.], [0., 2.]])
  >>> rkd_angle(x, 2 * x).round(4)
  Array(0., dtype=float32)
  """
  student, teacher, where = flat_rows(student, teacher, where, axis_name)
  sides = [geometry(x, where) for x in (student, teacher)]

  @jax.checkpoint  # The gradient then also holds B^2 cosines of one anchor at a time.
  def anchor(i):
    s, t = (_cosines(gram, square, i) for gram, square in sides)
    return _checks.smooth_l1(s - t).sum()

  size = where.shape[0]
  total = jax.lax.map(anchor, jnp.arange(size), batch_size=min(size, 16)).sum()
  return total / _rows.count(where, total.dtype) ** 3


def pkt(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """sum p log((p + 1e-7) / (q + 1e-7)) / B^2, p and q the rows of (cosine + 1) / 2 over their sums.

  The paper sums over all pairs; every implementation takes the mean, to which the weight belongs.

  Args:
    student: embeddings [B, ...].
    teacher: embeddings [B, ...], any width.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: batch sizes differ.

  Compares: neighborhoods of examples as probabilities
  Shapes: [B, ...], [B, ...] -> scalar
  Use: retrieval, penultimate features
  Weight: 30000
  Source: PKT, Passalis & Tefas 2018

  >>> x = jnp.array([[1., 0.], [0., 1.]])
  >>> pkt(x, 3 * x)
  Array(0., dtype=float32)
  """
  student, teacher, where = flat_rows(student, teacher, where, axis_name)
  pairs = where[:, None] & where[None]
  q, p = (_neighbors(x, pairs) for x in (student, teacher))
  terms = p * (jnp.log(p + 1e-7) - jnp.log(q + 1e-7))
  return terms.sum() / _rows.count(where, p.dtype) ** 2


def correlation_congruence(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  kernel: str = "gaussian",
  gamma: Scalar = 0.4,
  degree: int = 2,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """sum (K_s - K_t)^2 / B^2 between kernel matrices.

  'bilinear': K = x'y. 'gaussian': exp(-gamma |x - y|^2) of rows of norm 1, by its Taylor series
  exp(-2 gamma) sum_{p <= degree} (2 gamma)^p (x'y)^p / p!. The series is exact for unit rows only,
  so they are normalized here; torchdistill does not normalize them, and takes the norm of the
  difference instead of its square.

  Args:
    student: embeddings [B, ...].
    teacher: embeddings [B, ...], any width.
    kernel: 'gaussian' or 'bilinear'.
    gamma: width parameter > 0 of the Gaussian kernel, may be traced.
    degree: degree >= 1 of its Taylor series.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: batch sizes differ, an unknown kernel, gamma <= 0, or degree < 1.

  Compares: kernel matrices between examples
  Shapes: [B, ...], [B, ...] -> scalar
  Use: penultimate features
  Weight: not published for a mean over the batch
  Source: CCKD, Peng et al. 2019, arXiv:1904.01802

  >>> correlation_congruence(jnp.eye(2), jnp.ones((2, 1)), kernel="bilinear")
  Array(0.5, dtype=float32)
  """
  if kernel not in ("gaussian", "bilinear"):
    raise ValueError(f"kernel: expected 'gaussian' or 'bilinear', got {kernel!r}")
  if degree < 1:
    raise ValueError(f"degree: expected at least 1, got {degree}")
  student, teacher, where = flat_rows(student, teacher, where, axis_name)
  gamma = _checks.positive("gamma", gamma, student.dtype)

  def matrix(x):
    if kernel == "bilinear":
      return _rows.gram(x)
    cosine = _rows.gram(_checks.unit(x))
    series = sum((2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(1, degree + 1))
    return jnp.exp(-2 * gamma) * series  # The constant of p = 0 cancels.

  return ((matrix(student) - matrix(teacher)) ** 2).sum() / _rows.count(where, student.dtype) ** 2


def flat_rows(
  student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None, axis_name: str | None
) -> tuple[jax.Array, ...]:
  """Returns flattened rows of all devices, two at least, and `where`."""
  student = _checks.array("student", student, ndim=1)
  teacher = _checks.array("teacher", teacher, ndim=1)
  if student.shape[0] != teacher.shape[0]:
    raise ValueError(
      f"student: expected the teacher's batch size, got student {student.shape} and teacher "
      f"{teacher.shape}"
    )
  dtype = reduce.common_dtype(student.dtype, teacher.dtype)
  s, t = (_rows.flat(x).astype(dtype) for x in (student, teacher))
  rows = _rows.gather(s, t, where=where, axis_name=axis_name)
  _rows.check_several(rows[0])
  return rows


def geometry(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the Gram matrix of centered rows and their squared distances, 0 for invalid rows."""
  # Distances of centered rows lose fewer digits.
  mean = x.sum(0, keepdims=True) / _rows.count(where, x.dtype)
  gram = _rows.gram(jnp.where(where[:, None], x - mean, 0))
  norms = jnp.diag(gram)
  sums = norms[:, None] + norms[None]
  square = sums - 2 * gram
  pairs = where[:, None] & where[None] & ~jnp.eye(len(x), dtype=bool)
  return gram, jnp.where(pairs & (square > 8 * jnp.finfo(x.dtype).eps * sums), square, 0)


def _scaled(distance: jax.Array, num_pairs: jax.Array) -> jax.Array:
  """Returns distances over the mean of `num_pairs` of them; zeros where all are 0."""
  total = distance.sum()
  return distance * jnp.where(total > 0, num_pairs / jnp.where(total > 0, total, 1), 0)


def _cosines(gram: jax.Array, square: jax.Array, i: jax.Array) -> jax.Array:
  """Returns cosines of the angles at row i between all rows; 0 where a side has length 0."""
  inner = gram - gram[i][:, None] - gram[i][None] + gram[i, i]
  present = square[i] > 0
  inverse = jnp.where(present, jax.lax.rsqrt(jnp.where(present, square[i], 1)), 0)
  return inner * inverse[:, None] * inverse[None]


def _neighbors(x: jax.Array, pairs: jax.Array) -> jax.Array:
  """Returns rows of (cosine + 1) / 2 over their sums, 0 outside `pairs`."""
  similar = jnp.where(pairs, (_rows.gram(_checks.unit(x)) + 1) / 2, 0)
  total = similar.sum(-1, keepdims=True)
  return similar / jnp.where(total > 0, total, 1)
