"""Losses that relate each row of a batch to its neighbors: the nearest rows, or the next one.

`where` and `axis_name` as in relations.py.
"""

import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar
from distill_jax.losses.relations import flat_rows, geometry


def dark_rank(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  alpha: Scalar = 3.0,
  beta: Scalar = 3.0,
  length: int = 4,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """-<log P(order)>: the student's likelihood of the teacher's order of each row's nearest rows.

  P = prod_i exp(S_i) / sum_{k >= i} exp(S_k) over the `length` rows that are nearest to a row by
  the teacher, nearest first, with the student's scores S = -alpha distance^beta: the paper's hard
  transfer. The paper orders the whole batch; its list has `length` rows in RKD's code, as here.
  The gradient does not reach the teacher: an order has none.

  Args:
    student: embeddings [B, ...].
    teacher: embeddings [B, ...], any width.
    alpha: scale > 0 of the scores, may be traced.
    beta: exponent >= 1 of the distances, may be traced.
    length: number >= 1 of nearest rows; B - 1 or more: all others.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    Nats, a scalar; not 0 at student = teacher.

  Raises:
    ValueError: batch sizes differ, alpha <= 0, beta < 1 or length < 1.

  Compares: which examples are nearest, in which order
  Shapes: [B, ...], [B, ...] -> scalar
  Use: metric learning and retrieval, embeddings of norm 1
  Weight: not published for a mean over the batch
  Source: DarkRank, Chen et al. 2018, arXiv:1707.01220; as in RKD's code

  >>> x = jnp.array([[0.], [1.], [3.]])
  >>> dark_rank(x, x).round(3)
  Array(0., dtype=float32)
  """
  student, teacher, where = flat_rows(student, teacher, where, axis_name)
  alpha = _checks.positive("alpha", alpha, student.dtype)
  beta = _checks.number("beta", beta, student.dtype, low=1)
  length = operator.index(length)
  if length < 1:
    raise ValueError(f"length: expected at least 1, got {length}")
  others = where[:, None] & where[None] & ~jnp.eye(where.shape[0], dtype=bool)
  scores = -alpha * _checks.root(geometry(student, where)[1]) ** beta
  distances = jnp.where(others, geometry(teacher, where)[1], jnp.inf)
  nearest = jnp.argsort(distances, stable=True)[:, : min(length, max(len(where) - 1, 1))]
  is_other = jnp.take_along_axis(others, nearest, -1)
  scores = jnp.where(is_other, jnp.take_along_axis(scores, nearest, -1), -jnp.inf)
  not_before = jnp.triu(jnp.ones((nearest.shape[1],) * 2, bool))
  remaining = _softmax.log_sum(jnp.where(not_before[None], scores[:, None, :], -jnp.inf))
  surprise = jnp.where(is_other, remaining, 0) - jnp.where(is_other, scores, 0)
  return surprise.sum() / _rows.count(where, surprise.dtype)


def correlation(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Mean over i of sum_c d_ic d_(i+1)c, d = |s - t|: errors that two rows in a row share.

  RepDistiller's `Correlation`, from CCKD's authors; their paper's loss is
  `correlation_congruence`. It depends on the order of the rows. Rows that are not valid are
  skipped: a row's next one is the next valid one.

  Args:
    student: embeddings [B, ...], projected to the teacher's shape.
    teacher: embeddings of the same shape.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar; 0 with fewer than 2 valid rows.

  Raises:
    ValueError: shapes differ.

  Compares: embeddings of two examples at a time
  Shapes: [B, ...] -> scalar
  Use: penultimate features of a fixed width, to reproduce RepDistiller's CC
  Weight: 0.02
  Source: `Correlation` in RepDistiller, Tian et al. 2020, after Peng et al. 2019

  >>> correlation(jnp.array([[1.], [2.], [3.]]), jnp.zeros((3, 1)))
  Array(4., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  student, teacher, where = _rows.gather(student, teacher, where=where, axis_name=axis_name)
  _rows.check_several(student)
  order = jnp.argsort(~where, stable=True)  # The valid rows first: errors of the others are 0.
  error = _rows.flat(jnp.abs(student - teacher))[order]
  return (error[:-1] * error[1:]).sum() / jnp.maximum(where.sum(dtype=error.dtype) - 1, 1)
