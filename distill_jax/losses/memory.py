"""Contrastive representation distillation (CRD): a student's row against a memory of all examples.

Rows are L2-normalized here. The memory is an argument and a result of the loss; it has no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import compat
from distill_jax.losses import _checks, _rows
from distill_jax.losses._checks import Scalar


class CrdState(NamedTuple):
  """The memory of `crd`.

  Attributes:
    student: the student's last embedding of every example, [N, D].
    teacher: the teacher's last embedding of every example, [N, D].
    normalizers: the constants Z of student and teacher, [2]; 0 until the first batch sets them.

  >>> crd_state(jax.random.key(0), 5, 2).normalizers  # no batch yet
  Array([0., 0.], dtype=float32)
  """

  student: jax.Array
  teacher: jax.Array
  normalizers: jax.Array


def crd_state(key: jax.Array, examples: int, width: int) -> CrdState:
  """Returns memories sampled uniformly from +-sqrt(3 / width), as in the reference code.

  >>> crd_state(jax.random.key(0), 5, 2).student.shape
  (5, 2)
  """
  if examples < 1 or width < 1:
    raise ValueError(f"examples, width: expected at least 1 each, got {examples} and {width}")
  bound = (3 / width) ** 0.5
  memories = jax.random.uniform(key, (2, examples, width), jnp.float32, -bound, bound)
  return CrdState(memories[0], memories[1], jnp.zeros(2, jnp.float32))


def crd(
  student: ArrayLike,
  teacher: ArrayLike,
  indices: ArrayLike,
  negatives: ArrayLike,
  state: CrdState,
  *,
  temperature: Scalar = 0.07,
  momentum: Scalar = 0.5,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, CrdState]:
  """Noise-contrastive estimation with a memory of all N examples, both directions.

  Each side's row is compared with the other side's memory at the row's index (the positive) and at
  K negatives. With h = exp(cos / T) / Z / (exp(cos / T) / Z + K / N): -log h(positive) - sum log(1
  - h(negative)), student and teacher summed. Z is set from the first batch (N times the mean of its
  scores) and stays constant. As in the reference code 1e-7 is added to K / N in the denominator.
  The memories then move by 1 - momentum to the rows.

  2 B (K + 1) D values are gathered from the memories: 1 GB in float32 at B = 64, K = 16384 and D =
  128.

  Args:
    student: embeddings [B, D], from a learned linear layer.
    teacher: embeddings of the same shape, from a second learned linear layer.
    indices: positions of the rows in the data set, distinct integers [B] in [0, N).
    negatives: indices of other examples, integers [B, K].
    state: memory from `crd_state` or the last call.
    temperature: T > 0, may be traced.
    momentum: fraction of a memory that stays, in [0, 1), may be traced.
    where: valid rows, bool [B]: only they change the state. Pass it to the mean of the loss too.
    axis_name: mapped axis whose devices hold the other rows, so that all keep one state.

  Returns:
    Nats per row, [B], and the next state. A row with an index outside [0, N) is NaN, and leaves
    the state as it is.

  Raises:
    ValueError: shapes differ or do not fit the memory, indices are not integers, temperature <= 0,
      or momentum outside [0, 1).

  Compares: each example with a memory of all others
  Shapes: [B, D], indices [B], negatives [B, K], state -> [B], state
  Use: image classification, the penultimate features; K 16384
  Weight: 0.8
  Source: CRD, Tian et al. 2020, arXiv:1910.10699

  >>> state = crd_state(jax.random.key(0), 5, 2)
  >>> indices, negatives = jnp.array([0, 1]), jnp.array([[2, 3], [3, 4]])
  >>> loss, state = crd(jnp.eye(2), jnp.eye(2), indices, negatives, state)
  >>> loss.shape
  (2,)
  """
  student, teacher = _checks.pair(student, teacher, exactly=2)
  size, width = state.student.shape
  if student.shape[1] != width:
    raise ValueError(
      f"state: expected a memory [N, {student.shape[1]}] for student {student.shape}, got "
      f"{state.student.shape}"
    )
  indices = _checks.integers("indices", indices, student.shape[:1])
  negatives = _checks.integers("negatives", negatives, (len(indices), jnp.shape(negatives)[-1]))
  t = _checks.positive("temperature", temperature, student.dtype)
  momentum = _checks.number("momentum", momentum, student.dtype, low=0, high=1, open_high=True)
  student, teacher = _checks.unit(student), _checks.unit(teacher)
  state = jax.lax.stop_gradient(CrdState(*map(jnp.asarray, state)))
  entries = jnp.concatenate([indices[:, None], negatives], 1)
  scores = [
    jnp.einsum("bkd,bd->bk", memory[entries].astype(x.dtype), x, precision=_checks.HIGHEST) / t
    for memory, x in ((state.teacher, student), (state.student, teacher))
  ]
  inside = ((entries >= 0) & (entries < size)).all(1)
  valid = _rows.valid(where, len(indices)) & inside
  normalizers = [
    _normalizer(s, z, size, valid, axis_name) for s, z in zip(scores, state.normalizers)
  ]
  noise = negatives.shape[1] / size
  odds = [s - jnp.log(z * noise) for s, z in zip(scores, normalizers)]
  value = jnp.where(inside, _nce(odds[0], noise) + _nce(odds[1], noise), jnp.nan)
  rows = jax.lax.stop_gradient((student, teacher, indices))
  return value, _update(state, rows, jnp.stack(normalizers), momentum, valid, axis_name)


def _nce(log_odds: jax.Array, noise: float) -> jax.Array:
  """Returns [B] from log(exp(cos / T) / Z / noise), [B, 1 + K]; the positive is the first."""
  # Relative to the noise: the many small terms of the negatives keep their digits.
  log_sum = jnp.logaddexp(log_odds, jnp.log1p(1e-7 / noise))
  return (log_sum[:, 0] - log_odds[:, 0]) + log_sum[:, 1:].sum(-1)


def _normalizer(
  scores: jax.Array, z: jax.Array, size: int, valid: jax.Array, axis_name: str | None
) -> jax.Array:
  """Returns Z, or N times the mean score of this batch while it is 0."""
  first = size * _rows.mean(jnp.exp(jax.lax.stop_gradient(scores)).mean(-1), valid, axis_name)
  first = jnp.where(_rows.total(valid, axis_name) > 0, first, 1)
  return jnp.where(z > 0, z.astype(scores.dtype), first)


def _update(
  state: CrdState, rows: tuple, normalizers, momentum, valid: jax.Array, axis_name: str | None
) -> CrdState:
  """Returns the next state: memories moved to the valid rows (student, teacher, indices)."""
  student, teacher, indices = rows
  position = jnp.where(valid, indices, state.student.shape[0])  # Beyond the end: dropped.
  if axis_name is not None:
    student, teacher, position = (
      compat.all_gather_invarying(x, axis_name) for x in (student, teacher, position)
    )

  def move(memory, rows):
    old = memory.at[position].get(mode="fill", fill_value=0).astype(rows.dtype)
    moved = _checks.unit(momentum * old + (1 - momentum) * rows)
    return memory.at[position].set(moved.astype(memory.dtype), mode="drop")

  any_valid = _rows.total(valid, axis_name) > 0
  normalizers = normalizers.astype(state.normalizers.dtype)
  normalizers = jnp.where(any_valid, normalizers, state.normalizers)
  return CrdState(move(state.student, student), move(state.teacher, teacher), normalizers)
