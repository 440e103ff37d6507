"""Contrastive losses: a student's row against the teacher's rows of this and other examples.

Rows are L2-normalized here. State (a memory, a queue, a center) is an argument and a result of the
loss; it has no gradient.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar


def info_nce(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 0.07,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """-mean_i log softmax_j(cos(s_i, t_j) / T)_i: each student row against the batch's teacher rows.

  One direction; for both add `info_nce(teacher, student)`. No factor T^2: T sharpens similarities
  here.

  Args:
    student: embeddings [B, D].
    teacher: embeddings of the same shape.
    temperature: T > 0, may be traced.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar, nats.

  Raises:
    ValueError: shapes differ or are not [B, D], or temperature <= 0.

  Compares: each example with all of the batch
  Shapes: [B, D] -> scalar
  Use: embeddings, with large batches
  Weight: 1
  Source: van den Oord et al. 2018, arXiv:1807.03748

  >>> info_nce(jnp.eye(2), jnp.eye(2), temperature=1.).round(2)
  Array(0.31, dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, exactly=2)
  t = _checks.positive("temperature", temperature, student.dtype)
  student, teacher, where = _rows.gather(student, teacher, where=where, axis_name=axis_name)
  _rows.check_several(student)
  similar = jnp.matmul(_checks.unit(student), _checks.unit(teacher).T, precision=_checks.HIGHEST)
  columns = jnp.broadcast_to(where, similar.shape)
  log_q = _softmax.log_softmax(similar, mask=columns, temperature=t)
  values = jnp.where(where, -jnp.diag(log_q), 0)
  return values.sum() / _rows.count(where, values.dtype)


def queue_similarity(
  student: ArrayLike,
  teacher: ArrayLike,
  queue: ArrayLike,
  *,
  student_temperature: Scalar = 0.2,
  teacher_temperature: Scalar = 0.01,
) -> jax.Array:
  """Cross entropy between similarities to [t_i, queue]: the student's softmax under the teacher's.

  The positive, the teacher's row of the same example, is prepended to the queue. No factor T^2.

  Args:
    student: embeddings [B, D].
    teacher: embeddings of the same shape.
    queue: teacher embeddings of earlier batches, [Q, D].
    student_temperature: > 0, may be traced.
    teacher_temperature: > 0, sharper (smaller) than the student's; may be traced.

  Returns:
    Nats per row, [B]; not 0 at student = teacher.

  Raises:
    ValueError: shapes differ, the queue's width differs, or a temperature <= 0.

  Compares: similarities to a queue of other examples
  Shapes: [B, D], queue [Q, D] -> [B]
  Use: self-supervised teachers; needs no labels and no large batch
  Weight: 1, as the only loss
  Source: SEED, Fang et al. 2021, arXiv:2101.04731

  >>> queue_similarity(jnp.eye(2), jnp.eye(2), jnp.eye(2)[:1]).round(4)
  Array([0.6931, 0.0067], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, exactly=2)
  queue = _checks.array("queue", queue, exactly=2).astype(student.dtype)
  if queue.shape[1] != student.shape[1]:
    raise ValueError(f"queue: expected the student's width, {student.shape[1]}, got {queue.shape}")
  t_s = _checks.positive("student_temperature", student_temperature, student.dtype)
  t_t = _checks.positive("teacher_temperature", teacher_temperature, student.dtype)
  student, teacher, queue = (_checks.unit(x) for x in (student, teacher, queue))

  def log_similarity(x, temperature):
    others = jnp.matmul(x, queue.T, precision=_checks.HIGHEST)
    positive = (x * teacher).sum(-1, keepdims=True)
    return _softmax.log_softmax(jnp.concatenate([positive, others], -1), temperature=temperature)

  return _softmax.cross_entropy(log_similarity(teacher, t_t), log_similarity(student, t_s))


def dino(
  student_views: ArrayLike,
  teacher_views: ArrayLike,
  center: ArrayLike,
  *,
  student_temperature: Scalar = 0.1,
  teacher_temperature: Scalar = 0.04,
  momentum: Scalar = 0.9,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Mean over pairs of different views of -sum softmax((t - center) / T_t) log softmax(s / T_s).

  View i of the teacher is view i of the student; the student may have more (local crops). The
  teacher's side is a constant (`stop_gradient`), as the method needs. The center then moves by 1
  - momentum to the mean of the teacher's outputs. No factor T^2.

  Args:
    student_views: outputs [V, B, K].
    teacher_views: outputs [U, B, K], U <= V.
    center: [K], zeros at first.
    student_temperature: T_s > 0, may be traced.
    teacher_temperature: T_t > 0, may be traced (the paper warms it up from 0.04 to 0.07).
    momentum: fraction of the center that stays, in [0, 1), may be traced.
    where: valid rows, bool [B]: only they change the center. Pass it to the mean of the loss too.
    axis_name: mapped axis whose devices hold the other rows, so that all keep one center.

  Returns:
    Nats per row, [B], and the next center.

  Raises:
    ValueError: shapes do not fit, fewer than 2 views of the student, more of the teacher than of
      the student, a temperature <= 0, or momentum outside [0, 1).

  Compares: different views of one image, the teacher's centered and sharpened
  Shapes: [V, B, K], [U, B, K], center [K] -> [B], [K]
  Use: self-supervision with an EMA teacher
  Weight: 1, as the only loss
  Source: DINO, Caron et al. 2021, equations 2 and 4, arXiv:2104.14294

  >>> loss, center = dino(jnp.zeros((2, 1, 4)), jnp.ones((2, 1, 4)), jnp.zeros(4))
  >>> loss.round(4), center.round(1)
  (Array([1.3863], dtype=float32), Array([0.1, 0.1, 0.1, 0.1], dtype=float32))
  """
  student, teacher = (
    _checks.array(name, x, exactly=3)
    for name, x in (("student_views", student_views), ("teacher_views", teacher_views))
  )
  if (
    student.shape[1:] != teacher.shape[1:]
    or not 1 <= len(teacher) <= len(student)
    or len(student) < 2
  ):
    raise ValueError(
      f"teacher_views: expected [U, B, K] for student_views [V, B, K] with U <= V and V > 1, got "
      f"{teacher.shape} for {student.shape}"
    )
  dtype = reduce.common_dtype(student.dtype, teacher.dtype)
  center = _checks.array("center", center).astype(dtype)
  if center.shape != student.shape[2:]:
    raise ValueError(f"center: expected shape {student.shape[2:]}, got {center.shape}")
  t_s = _checks.positive("student_temperature", student_temperature, dtype)
  t_t = _checks.positive("teacher_temperature", teacher_temperature, dtype)
  momentum = _checks.number("momentum", momentum, dtype, low=0, high=1, open_high=True)
  teacher, center = jax.lax.stop_gradient((teacher.astype(dtype), center))
  log_q = _softmax.log_softmax(student.astype(dtype), temperature=t_s)
  log_p = _softmax.log_softmax(teacher - center[None, None], temperature=t_t)
  others = [sum(log_q[j] for j in range(len(student)) if j != i) for i in range(len(teacher))]
  value = _softmax.cross_entropy(log_p, jnp.stack(others) / (len(student) - 1)).mean(0)
  valid = _rows.valid(where, student.shape[1])
  moved = momentum * center + (1 - momentum) * _rows.mean(teacher.mean(0), valid, axis_name)
  return value, jnp.where(_rows.total(valid, axis_name) > 0, moved, center)
