"""Losses that relate the rows of a batch by their class probabilities: logits [B, C] give a scalar.

`where` and `axis_name` as in relations.py. Sequences are flattened first: [B, T, C] -> [B T, C],
the token mask as `where`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar


def dist(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  beta: Scalar = 1.0,
  gamma: Scalar = 1.0,
  temperature: Scalar = 1.0,
  class_mask: ArrayLike | None = None,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """T^2 [beta <1 - pearson(p_i, q_i)> over rows + gamma <1 - pearson> over classes].

  1e-8 is added to the product of the two norms, as in the reference code.

  Args:
    student: logits [B, C].
    teacher: logits of the same shape.
    beta: weight >= 0 of the relation between classes (within a row), may be traced.
    gamma: weight >= 0 of the relation within a class (along the batch), may be traced.
    temperature: T > 0, may be traced.
    class_mask: classes that exist, bool, broadcastable to the logits.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: shapes differ or are not [B, C], temperature <= 0, or a negative weight.

  Compares: class probabilities up to scale and shift, along rows and along classes
  Shapes: [B, C] -> scalar
  Use: a teacher much stronger than the student
  Weight: 1 in addition to cross entropy (ImageNet: beta 2, gamma 2; CIFAR-100 at T 4)
  Source: DIST, Huang et al. 2022, arXiv:2205.10536

  >>> x = jnp.array([[1., 2., 4.], [3., 2., 0.]])
  >>> abs(dist(x, x)).round(4)
  Array(0., dtype=float32)
  """
  q, p, exists, where, t = _probabilities(
    student, teacher, temperature, class_mask, where, axis_name
  )
  beta = _checks.number("beta", beta, q.dtype, low=0)
  gamma = _checks.number("gamma", gamma, q.dtype, low=0)
  exists &= where[:, None]
  return t**2 * (
    beta * _correlation_distance(q, p, exists, 1) + gamma * _correlation_distance(q, p, exists, 0)
  )


def class_gram(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  class_mask: ArrayLike | None = None,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Squared Frobenius norm of P'P - Q'Q over the number of classes.

  The entries of P'P grow with rows / classes: at 128 rows of 10 classes the value is some 400 times
  that at the paper's 64 rows of 100, for which the weight is published.

  Args:
    student: logits [B, C].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced; no factor T^2.
    class_mask: classes that exist, bool, broadcastable to the logits.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: shapes differ or are not [B, C], or temperature <= 0.

  Compares: which classes go together in the batch
  Shapes: [B, C] -> scalar
  Use: with kl_divergence and batch_gram, summed over temperatures 2 to 6
  Weight: 1
  Source: MLKD, Jin et al. 2023, "Multi-level logit distillation" (CVPR)

  >>> class_gram(jnp.array([[0., 0.]]), jnp.array([[0., -jnp.inf]]))
  Array(0.375, dtype=float32)
  """
  q, p, exists, _, _ = _probabilities(student, teacher, temperature, class_mask, where, axis_name)
  classes = _rows.count(exists.any(0), p.dtype)
  return ((_rows.gram(p.T) - _rows.gram(q.T)) ** 2).sum() / classes


def batch_gram(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  class_mask: ArrayLike | None = None,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Squared Frobenius norm of PP' - QQ' over the number of rows.

  Args:
    student: logits [B, C].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced; no factor T^2.
    class_mask: classes that exist, bool, broadcastable to the logits.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar.

  Raises:
    ValueError: shapes differ or are not [B, C], or temperature <= 0.

  Compares: which examples get similar probabilities
  Shapes: [B, C] -> scalar
  Use: with kl_divergence and class_gram, summed over temperatures 2 to 6
  Weight: 1
  Source: MLKD, Jin et al. 2023, "Multi-level logit distillation" (CVPR)

  >>> batch_gram(jnp.array([[0., 0.]]), jnp.array([[0., -jnp.inf]]))
  Array(0.25, dtype=float32)
  """
  q, p, _, where, _ = _probabilities(student, teacher, temperature, class_mask, where, axis_name)
  return ((_rows.gram(p) - _rows.gram(q)) ** 2).sum() / _rows.count(where, p.dtype)


def _probabilities(
  student: ArrayLike,
  teacher: ArrayLike,
  temperature: Scalar,
  class_mask: ArrayLike | None,
  where: ArrayLike | None,
  axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Scalar]:
  """Returns q, p, existing classes, valid rows (of all devices) and T; invalid rows are 0."""
  _checks.pair(student, teacher, exactly=2)
  mask = _checks.mask("class_mask", class_mask, jnp.shape(student))
  mask = jnp.ones(jnp.shape(student), bool) if mask is None else mask
  student, teacher, mask, where = _rows.gather(
    jnp.asarray(student), jnp.asarray(teacher), mask, where=where, axis_name=axis_name
  )
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, class_mask=mask)
  valid = where[:, None]
  q, p = (jnp.where(valid, jnp.exp(x), 0) for x in (log_q, log_p))
  return q, p, valid & ((log_q != -jnp.inf) | (log_p != -jnp.inf)), where, t


def _correlation_distance(q: jax.Array, p: jax.Array, exists: jax.Array, axis: int) -> jax.Array:
  """Returns the mean over rows (axis 1) or columns (axis 0) of 1 - Pearson's r along `axis`."""
  count = jnp.maximum(exists.sum(axis, keepdims=True, dtype=q.dtype), 1)
  q, p = (jnp.where(exists, x - x.sum(axis, keepdims=True) / count, 0) for x in (q, p))
  norms = _checks.root((q**2).sum(axis)) * _checks.root((p**2).sum(axis))
  used = exists.any(axis)
  values = jnp.where(used, 1 - (q * p).sum(axis) / (norms + 1e-8), 0)
  return values.sum() / _rows.count(used, values.dtype)
