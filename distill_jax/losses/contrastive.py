"""Contrastive losses: the student's row against its own teacher's row and against others.

Rows are L2-normalized here, so embeddings may come as they are. State (a memory, a queue, a center) comes in as
an argument and goes out as a result; it carries no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks, _rows, _softmax


def info_nce(student, teacher, *, temperature=0.07, where=None, axis_name=None) -> jax.Array:
  """-mean_i log softmax_j(cos(s_i, t_j) / T)_i: each student row against the teacher's rows of the batch.

  One direction; for both add `info_nce(teacher, student)`. No factor T^2: T sharpens similarities here.

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
  similar = jnp.matmul(_checks.unit(student), _checks.unit(teacher).T, precision=_checks.HIGHEST)
  log_q = _softmax.log_softmax(similar / t, mask=jnp.broadcast_to(where, similar.shape))
  own = jnp.where(where, -jnp.diag(log_q), 0)
  return own.sum() / _rows.count(where, own.dtype)


def queue_similarity(
  student, teacher, queue, *, student_temperature=0.2, teacher_temperature=0.01
) -> jax.Array:
  """Cross entropy between similarities to [t_i, queue]: the student's softmax under the teacher's.

  The positive, the teacher's own row, is prepended to the queue. No factor T^2.

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
  Weight: 1, alone
  Source: SEED, Fang et al. 2021, arXiv:2101.04731

  >>> queue_similarity(jnp.eye(2), jnp.eye(2), jnp.eye(2)[:1]).round(4)
  Array([0.6931, 0.0067], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, exactly=2)
  queue = _checks.array("queue", queue, exactly=2).astype(student.dtype)
  if queue.shape[1] != student.shape[1]:
    raise ValueError(f"queue {queue.shape} and student {student.shape} must have the same width")
  t_s = _checks.positive("student_temperature", student_temperature, student.dtype)
  t_t = _checks.positive("teacher_temperature", teacher_temperature, student.dtype)
  student, teacher, queue = (_checks.unit(x) for x in (student, teacher, queue))

  def log_similarity(x, temperature):
    others = jnp.matmul(x, queue.T, precision=_checks.HIGHEST)
    own = (x * teacher).sum(-1, keepdims=True)
    return _softmax.log_softmax(jnp.concatenate([own, others], -1) / temperature)

  return _softmax.cross_entropy(log_similarity(teacher, t_t), log_similarity(student, t_s))


class CrdState(NamedTuple):
  """What `crd` remembers.

  Attributes:
    student: the last embedding of every example, [N, D].
    teacher: the same of the teacher.
    normalizers: the constants Z of student and teacher, [2]; 0 until the first batch sets them.
  """

  student: jax.Array
  teacher: jax.Array
  normalizers: jax.Array


def crd_state(key, examples: int, width: int) -> CrdState:
  """Memories drawn uniformly from +-sqrt(3 / width), as the reference code does.

  >>> crd_state(jax.random.key(0), 5, 2).student.shape
  (5, 2)
  """
  if examples < 1 or width < 1:
    raise ValueError(f"examples and width must be at least 1, got {examples} and {width}")
  bound = (3 / width) ** 0.5
  draw = jax.random.uniform(key, (2, examples, width), minval=-bound, maxval=bound)
  return CrdState(draw[0], draw[1], jnp.zeros(2))


def crd(
  student,
  teacher,
  indices,
  negatives,
  state,
  *,
  temperature=0.07,
  momentum=0.5,
  where=None,
  axis_name=None,
) -> tuple[jax.Array, CrdState]:
  """Noise-contrastive estimation with a memory of all N examples, both directions.

  Each side's row is compared with the other side's memory at its own index (the positive) and at K negatives.
  With h = exp(cos / T) / Z / (exp(cos / T) / Z + K / N): -log h(positive) - sum log(1 - h(negative)), student
  and teacher summed. Z is set from the first batch (N times the mean of its scores) and held. As in the
  reference code 1e-7 is added to K / N in the denominator. The memories then move by 1 - momentum to the rows.

  2 B (K + 1) D numbers are gathered from the memories: 1 GB in float32 at B = 64, K = 16384 and D = 128.

  Args:
    student: embeddings [B, D], from a learned linear layer.
    teacher: embeddings of the same shape, from its own learned linear layer.
    indices: of the rows in the data set, integers [B] in [0, N), each once.
    negatives: indices of other examples, integers [B, K].
    state: from `crd_state` or the last call.
    temperature: T > 0, may be traced.
    momentum: of the memories, in [0, 1), may be traced.
    where: valid rows, bool [B]: only they reach the state. The mean of the loss needs it too.
    axis_name: mapped axis whose devices hold the other rows, so that all keep one state.

  Returns:
    Nats per row, [B], and the next state.

  Raises:
    ValueError: shapes differ or do not fit the memory, indices are not integers, temperature <= 0, or momentum
      outside [0, 1).

  Compares: each example with a memory of all others
  Shapes: [B, D], indices [B], negatives [B, K], state -> [B], state
  Use: image classification, the penultimate features; K 16384
  Weight: 0.8
  Source: CRD, Tian et al. 2020, arXiv:1910.10699

  >>> state = crd_state(jax.random.key(0), 5, 2)
  >>> loss, state = crd(jnp.eye(2), jnp.eye(2), jnp.array([0, 1]), jnp.array([[2, 3], [3, 4]]), state)
  >>> loss.shape
  (2,)
  """
  student, teacher = _checks.pair(student, teacher, exactly=2)
  size, width = state.student.shape
  if student.shape[1] != width:
    raise ValueError(f"student {student.shape} does not fit the memory {state.student.shape}")
  indices = _checks.integers("indices", indices, student.shape[:1])
  negatives = _checks.integers("negatives", negatives, (len(indices), jnp.shape(negatives)[-1]))
  t = _checks.positive("temperature", temperature, student.dtype)
  momentum = _checks.number("momentum", momentum, student.dtype, low=0, high=1, open_high=True)
  student, teacher = _checks.unit(student), _checks.unit(teacher)
  state = jax.lax.stop_gradient(CrdState(*map(jnp.asarray, state)))
  chosen = jnp.concatenate([indices[:, None], negatives], 1)
  scores = [
    jnp.einsum("bkd,bd->bk", memory[chosen].astype(x.dtype), x, precision=_checks.HIGHEST) / t
    for memory, x in ((state.teacher, student), (state.student, teacher))
  ]
  valid = _rows.valid(where, len(indices))
  normalizers = [
    _normalizer(s, z, size, valid, axis_name) for s, z in zip(scores, state.normalizers)
  ]
  noise = negatives.shape[1] / size
  value = sum(_nce(s - jnp.log(z * noise), noise) for s, z in zip(scores, normalizers))
  rows = jax.lax.stop_gradient((student, teacher, indices))
  return value, _remember(state, *rows, jnp.stack(normalizers), momentum, valid, axis_name)


def dino(
  student_views,
  teacher_views,
  center,
  *,
  student_temperature=0.1,
  teacher_temperature=0.04,
  momentum=0.9,
  where=None,
  axis_name=None,
) -> tuple[jax.Array, jax.Array]:
  """Mean over pairs of different views of -sum softmax((t - center) / T_t) log softmax(s / T_s).

  View i of the teacher is view i of the student; the student may have more (local crops). The teacher's side is
  held constant (`stop_gradient`), as the method needs. The center then moves by 1 - momentum to the mean of
  the teacher's outputs. No factor T^2.

  Args:
    student_views: outputs [V, B, K].
    teacher_views: outputs [U, B, K], U <= V.
    center: [K], zeros at first.
    student_temperature: T_s > 0, may be traced.
    teacher_temperature: T_t > 0, may be traced (the paper warms it up from 0.04 to 0.07).
    momentum: of the center, in [0, 1), may be traced.
    where: valid rows, bool [B]: only they reach the center. The mean of the loss needs it too.
    axis_name: mapped axis whose devices hold the other rows, so that all keep one center.

  Returns:
    Nats per row, [B], and the next center.

  Raises:
    ValueError: shapes do not fit, fewer than 2 views of the student, more of the teacher than of the student,
      a temperature <= 0, or momentum outside [0, 1).

  Compares: different views of one image, the teacher's centered and sharpened
  Shapes: [V, B, K], [U, B, K], center [K] -> [B], [K]
  Use: self-supervision with a moving-average teacher
  Weight: 1, alone
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
      f"student_views {student.shape} and teacher_views {teacher.shape} must be [V, B, K] and [U, B, K] with "
      "U <= V and V > 1"
    )
  dtype = jnp.promote_types(student.dtype, teacher.dtype)
  center = _checks.array("center", center).astype(dtype)
  if center.shape != student.shape[2:]:
    raise ValueError(f"center {center.shape} must be {student.shape[2:]}")
  t_s = _checks.positive("student_temperature", student_temperature, dtype)
  t_t = _checks.positive("teacher_temperature", teacher_temperature, dtype)
  momentum = _checks.number("momentum", momentum, dtype, low=0, high=1, open_high=True)
  teacher, center = jax.lax.stop_gradient((teacher.astype(dtype), center))
  log_q = _softmax.log_softmax(student.astype(dtype) / t_s)
  log_p = _softmax.log_softmax((teacher - center) / t_t)
  others = [sum(log_q[j] for j in range(len(student)) if j != i) for i in range(len(teacher))]
  value = _softmax.cross_entropy(log_p, jnp.stack(others) / (len(student) - 1)).mean(0)
  valid = _rows.valid(where, student.shape[1])
  moved = momentum * center + (1 - momentum) * _mean_row(teacher.mean(0), valid, axis_name)
  return value, jnp.where(_total(valid, axis_name) > 0, moved, center)


def _nce(log_odds, noise):
  """[B, 1 + K] of log(exp(cos / T) / Z / noise) -> [B]; the positive is the first."""
  # Relative to the noise: the many small terms of the negatives keep their digits.
  log_sum = jnp.logaddexp(log_odds, jnp.log1p(1e-7 / noise))
  return (log_sum[:, 0] - log_odds[:, 0]) + log_sum[:, 1:].sum(-1)


def _normalizer(scores, z, size, valid, axis_name):
  """Z, or N times the mean score of this batch while it is 0."""
  first = size * _mean_row(jnp.exp(jax.lax.stop_gradient(scores)).mean(-1), valid, axis_name)
  return jnp.where(z > 0, z, jnp.where(_total(valid, axis_name) > 0, first, 1)).astype(scores.dtype)


def _remember(state, student, teacher, indices, normalizers, momentum, valid, axis_name):
  size = state.student.shape[0]
  place = jnp.where(valid, indices, size)  # beyond the end: dropped
  if axis_name is not None:
    student, teacher, place = (
      jax.lax.all_gather(x, axis_name, tiled=True, to="invarying")
      for x in (student, teacher, place)
    )

  def move(memory, rows):
    moved = momentum * memory.at[place].get(mode="fill", fill_value=0) + (1 - momentum) * rows
    return memory.at[place].set(_checks.unit(moved).astype(memory.dtype), mode="drop")

  seen = _total(valid, axis_name) > 0
  held = jnp.where(seen, normalizers, state.normalizers).astype(state.normalizers.dtype)
  return CrdState(move(state.student, student), move(state.teacher, teacher), held)


def _mean_row(x, valid, axis_name):
  """Mean over the valid rows of all devices."""
  total = jnp.where(_rows.column(valid, x.ndim), x, 0).sum(0)
  total = total if axis_name is None else jax.lax.psum(total, axis_name)
  return total / jnp.maximum(_total(valid, axis_name), 1)


def _total(valid, axis_name):
  number = valid.sum()
  return number if axis_name is None else jax.lax.psum(number, axis_name)
