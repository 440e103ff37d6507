"""A loss without a teacher: soft labels are made of the student's own outputs.

`where` and `axis_name` as in relations.py.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar


def uskd(
  student: ArrayLike,
  weak: ArrayLike,
  labels: ArrayLike,
  *,
  alpha: Scalar = 1.0,
  beta: Scalar = 0.1,
  mu: Scalar = 0.005,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """<-alpha P log q_y - beta sum_{j != y} z_j log q^_j - mu sum_c e_c log w_c>, self-distillation.

  q and w are the softmaxes of student and weak logits. P = q_y^2 + 1 - <q_y^2>. q^ is q over the
  non-target classes, z Zipf's law 1 / rank, renormalized, by their rank in q^ + w^. e is the label
  smoothed by 0.1. P and z are constants of the gradient (`stop_gradient`). The reference code ranks
  by log q / (1 - log q_y) instead of q^, with the label among the ranked classes.

  Args:
    student: logits [B, C].
    weak: logits of a head on a middle layer, of the same shape.
    labels: integers [B].
    alpha: weight >= 0 of the target term, may be traced.
    beta: weight >= 0 of the non-target term, may be traced.
    mu: weight >= 0 of the weak head's cross entropy, may be traced.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    Nats, a scalar. NaN where the label of a valid row is no existing class.

  Raises:
    ValueError: shapes differ or are not [B, C], labels are not integers [B], or a negative weight.

  Compares: the student with soft labels from its own layers
  Shapes: [B, C], [B, C], labels [B] -> scalar
  Use: classification without a teacher
  Weight: 1 in addition to cross entropy; (alpha, beta, mu) is (1, 0.1, 0.005) on ImageNet and
    (0.1, 0.1, 0.1) on CIFAR-100
  Source: USKD, Yang et al. 2023, arXiv:2303.13005

  >>> z = jnp.array([[0., 0.]])
  >>> uskd(z, z, jnp.array([1]), mu=0.).round(4)
  Array(0.6931, dtype=float32)
  """
  student, weak = _checks.pair(student, weak, exactly=2)
  _softmax.check_classes(student)
  labels = _checks.integers("labels", labels, student.shape[:1])
  weights = {
    name: _checks.number(name, x, student.dtype, low=0)
    for name, x in (("alpha", alpha), ("beta", beta), ("mu", mu))
  }
  student, weak, labels, where = _rows.gather(
    student, weak, labels, where=where, axis_name=axis_name
  )
  log_q, log_w = (_softmax.log_softmax(z) for z in (student, weak))
  exists = (log_q != -jnp.inf) | (log_w != -jnp.inf)
  target = _softmax.one_hot(labels, log_q.shape)
  log_q_y = _softmax.log_gather(log_q, target)
  # From the logits: log-probabilities have lost digits where the target's dominates.
  others_q, others_w = (
    _softmax.log_softmax(jnp.where(target, -jnp.inf, z)) for z in (student, weak)
  )
  confidence = jax.lax.stop_gradient(jnp.where(where, jnp.exp(2 * log_q_y), 0))
  soft = confidence + 1 - confidence.sum() / _rows.count(where, confidence.dtype)
  values = (
    -weights["alpha"] * soft * log_q_y
    + weights["beta"]
    * _softmax.weighted_cross_entropy(_zipf(others_q, others_w, exists & ~target), others_q)
    + weights["mu"] * _softmax.weighted_cross_entropy(_smooth(target, exists, log_w.dtype), log_w)
  )
  values = _softmax.nan_at_invalid_labels(values, target, log_q)
  return jnp.where(where, values, 0).sum() / _rows.count(where, values.dtype)


def _zipf(log_q: jax.Array, log_w: jax.Array, others: jax.Array) -> jax.Array:
  """Returns 1 / rank of each class of `others` by q + w, over the sum; 0 elsewhere."""
  score = jax.lax.stop_gradient(jnp.exp(log_q) + jnp.exp(log_w))
  order = jnp.argsort(jnp.where(others, score, -1), -1, descending=True)
  rank = jnp.argsort(order, -1).astype(score.dtype) + 1
  zipf = jnp.where(others, 1 / rank, 0)
  total = zipf.sum(-1, keepdims=True)
  return zipf / jnp.where(total > 0, total, 1)


def _smooth(target: jax.Array, exists: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Returns 0.9 at the target plus 0.1 spread over the classes that exist."""
  count = jnp.maximum(exists.sum(-1, keepdims=True, dtype=dtype), 1)
  return jnp.where(target, 0.9, 0) + jnp.where(exists, 0.1 / count, 0)
