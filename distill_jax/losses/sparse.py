"""Losses of a student [..., V] against a teacher stored as K of V classes.

An index outside [0, V) gives NaN.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar
from distill_jax.losses.targets import SparseTargets


def sparse_kl(
  student: ArrayLike, targets: SparseTargets, *, class_mask: ArrayLike | None = None
) -> jax.Array:
  """T^2 KL over K + 1 classes: those of the targets and "all others", on both sides.

  Never negative, at most the full `kl_divergence`, and equal to it at K = V.

  Args:
    student: logits [..., V].
    targets: from `top_k`, not from `sample_k` (an index must not repeat).
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are random samples, their shapes do not fit the student's, or K > V.

  Compares: class probabilities of the teacher's top classes, the rest as one
  Shapes: [..., V], targets [..., K] -> [...]
  Use: the default for stored teachers of many classes
  Weight: as kl_divergence
  Source: the ghost token in Anshumann et al. 2025, arXiv:2503.16870

  >>> z = jnp.array([1., 2., 3., 4.])
  >>> abs(sparse_kl(z, top_k(z, 2))).round(6)
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _with_tail(student, targets, class_mask)
  return t**2 * _softmax.divergence(log_p, log_q)


def sparse_kl_conditional(
  student: ArrayLike, targets: SparseTargets, *, class_mask: ArrayLike | None = None
) -> jax.Array:
  """T^2 KL of both sides renormalized on the K classes.

  The student's probability of all other classes does not change it, so combine it with a label
  term. Many programs call it KL without a qualifier.

  Args:
    student: logits [..., V].
    targets: from `top_k`.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are random samples, their shapes do not fit the student's, or K > V.

  Compares: class probabilities among the teacher's top classes only
  Shapes: [..., V], targets [..., K] -> [...]
  Use: with a label term, where a teacher's tail was not stored
  Weight: as kl_divergence
  Source: common practice (top-k, renormalized)

  >>> targets = top_k(jnp.array([1., 2., -9.]), 2)
  >>> abs(sparse_kl_conditional(jnp.array([1., 2., 9.]), targets)).round(6)
  Array(0., dtype=float32)
  """
  z, indices, log_probs, _, t = _aligned(student, targets, class_mask)
  log_p = _softmax.log_softmax(log_probs)
  log_q = _softmax.log_softmax(_gather(z, indices), temperature=t)
  return t**2 * _softmax.divergence(log_p, log_q)


def sparse_kl_smoothed(
  student: ArrayLike, targets: SparseTargets, *, class_mask: ArrayLike | None = None
) -> jax.Array:
  """T^2 KL with the tail's probability spread evenly over the V - K other classes that exist.

  Args:
    student: logits [..., V].
    targets: from `top_k`.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are random samples, their shapes do not fit the student's, or K > V.

  Compares: class probabilities, the tail as uniform
  Shapes: [..., V], targets [..., K] -> [...]
  Use: ImageNet-sized vocabularies, where the tail is close to even
  Weight: as kl_divergence
  Source: TinyViT, Wu et al. 2022, arXiv:2207.10666; FKD, Shen & Xing 2022

  >>> z = jnp.array([2., 0., 0.])
  >>> abs(sparse_kl_smoothed(z, top_k(z, 1))).round(6)
  Array(0., dtype=float32)
  """
  z, indices, log_probs, log_tail, t = _aligned(student, targets, class_mask)
  log_q = _softmax.log_softmax(z, temperature=t)
  rest = _softmax.without(log_q, indices)
  others = rest != -jnp.inf
  count = others.sum(-1, dtype=log_q.dtype)
  mean = jnp.where(others, rest, 0).sum(-1) / jnp.maximum(count, 1)
  # The tail is spread over `count` classes, so that its part is tail (log(tail / count) - mean log
  # q). Without other classes it is probability that the student cannot match.
  has_tail = log_tail != -jnp.inf
  log_tail = jnp.where(has_tail, log_tail, 0)
  spread = jnp.exp(log_tail) * (log_tail - jnp.log(jnp.maximum(count, 1)) - mean)
  spread = jnp.where(has_tail, jnp.where(count > 0, spread, jnp.inf), 0)
  return t**2 * (_softmax.divergence(log_probs, _gather(log_q, indices)) + spread)


def sparse_jensen_shannon(
  student: ArrayLike,
  targets: SparseTargets,
  *,
  teacher_weight: Scalar = 0.5,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 [w KL(p || m) + (1 - w) KL(q || m)], m = w p + (1 - w) q, over K + 1 classes.

  The classes are those of the targets and "all others". Never negative, at most the full
  `jensen_shannon`, and equal to it at K = V. TRL takes the student's top k instead.

  Args:
    student: logits [..., V].
    targets: from `top_k`, not from `sample_k` (an index must not repeat).
    teacher_weight: w in (0, 1), may be traced; the temperature is the targets'.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...]; at most T^2 log 2, also where probabilities are 0.

  Raises:
    ValueError: the targets are random samples, their shapes do not fit the student's, K > V, or
      teacher_weight outside (0, 1).

  Compares: class probabilities of the teacher's top classes, the rest as one, bounded
  Shapes: [..., V], targets [..., K] -> [...]
  Use: stored teachers of language models on samples of the student
  Weight: 1
  Source: GKD, Agarwal et al. 2024, arXiv:2306.13649, with the ghost token of `sparse_kl`

  >>> z = jnp.array([1., 2., 3., 4.])
  >>> abs(sparse_jensen_shannon(z, top_k(z, 2))).round(6)
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _with_tail(student, targets, class_mask)
  w = _checks.number(
    "teacher_weight", teacher_weight, log_q.dtype, low=0, high=1, open_low=True, open_high=True
  )
  log_m = _softmax.mixture(log_p, log_q, w)
  return t**2 * (
    w * _softmax.divergence(log_p, log_m) + (1 - w) * _softmax.divergence(log_q, log_m)
  )


def sampled_cross_entropy(
  student: ArrayLike, targets: SparseTargets, *, class_mask: ArrayLike | None = None
) -> jax.Array:
  """-T^2 times the mean over random samples of log q.

  Its expectation and the expectation of its gradient are those of `soft_cross_entropy`.

  Args:
    student: logits [..., V].
    targets: from `sample_k`; repeats count as often as they occur.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are not random samples, or their shapes do not fit the student's.

  Compares: class probabilities, by random samples of the teacher
  Shapes: [..., V], targets [..., K] -> [...]
  Use: stored language-model teachers, where top-k is biased; K about 50
  Weight: as soft_cross_entropy
  Source: Sparse logit sampling, Anshumann et al. 2025, arXiv:2503.16870

  >>> sampled_cross_entropy(jnp.zeros(2), sample_k(jax.random.key(0), jnp.zeros(2), 5)).round(4)
  Array(0.6931, dtype=float32)
  """
  z, indices, log_probs, _, t = _aligned(student, targets, class_mask, sampled=True)
  log_q = _gather(_softmax.log_softmax(z, temperature=t), indices)
  return t**2 * _softmax.cross_entropy(log_probs, log_q)


def _with_tail(
  student: ArrayLike, targets: SparseTargets, class_mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, Scalar]:
  """Returns log-probabilities of student and teacher over K + 1 classes, and the temperature."""
  z, indices, log_probs, log_tail, t = _aligned(student, targets, class_mask)
  z = _softmax.centered(z) / t
  rest = _softmax.log_sum(_softmax.without(z, indices))
  log_q = _softmax.log_softmax(jnp.concatenate([_gather(z, indices), rest[..., None]], -1))
  return log_q, jnp.concatenate([log_probs, log_tail[..., None]], -1), t


def _aligned(
  student: ArrayLike, targets: SparseTargets, class_mask: ArrayLike | None, sampled: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Scalar]:
  """Returns student logits (-inf where masked) and the targets' checked parts."""
  student = _checks.array("student", student, ndim=1)
  shape = _check_targets(student, targets, sampled)
  dtype = reduce.common_dtype(student.dtype, targets.log_probs, targets.log_tail)
  indices = _checks.integers("indices", targets.indices, shape)
  indices = jnp.where(indices < 0, student.shape[-1], indices)  # A negative index would wrap.
  t = _checks.positive("temperature", targets.temperature, dtype)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  z = student.astype(dtype)
  z = z if mask is None else jnp.where(mask, z, -jnp.inf)
  return z, indices, targets.log_probs.astype(dtype), targets.log_tail.astype(dtype), t


def _check_targets(student: jax.Array, targets: SparseTargets, sampled: bool) -> tuple[int, ...]:
  """Raises unless the targets fit the loss and the student; returns the shape of their indices."""
  if targets.sampled is not None and targets.sampled != sampled:
    raise ValueError(
      "targets: expected top_k targets, got random samples (sample_k): use sampled_cross_entropy"
      if targets.sampled
      else "targets: expected random samples (sample_k), got top_k targets: use sparse_kl, "
      "sparse_kl_conditional or sparse_kl_smoothed"
    )
  log_probs = jnp.shape(targets.log_probs)
  log_tail = jnp.shape(targets.log_tail)
  shape = (*student.shape[:-1], log_probs[-1])
  if log_probs != shape or log_tail != shape[:-1]:
    raise ValueError(
      f"targets: expected log_probs [..., K] and log_tail [...] for student [..., V] "
      f"{student.shape}, got {log_probs} and {log_tail}"
    )
  if shape[-1] > student.shape[-1] and not sampled:
    raise ValueError(
      f"targets: expected at most the student's {student.shape[-1]} classes, got {shape[-1]}"
    )
  return shape


def _gather(z: jax.Array, indices: jax.Array) -> jax.Array:
  return jnp.take_along_axis(z, indices, -1, mode="fill", fill_value=jnp.nan)
