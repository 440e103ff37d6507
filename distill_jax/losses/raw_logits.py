"""Losses on logits without the teacher's softmax: raw values, its decision, or sigmoids.

A class is missing where `class_mask` is False or where both logits are -inf.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar


def logit_mse(
  student: ArrayLike, teacher: ArrayLike, *, axis: int = -1, class_mask: ArrayLike | None = None
) -> jax.Array:
  """<(student - teacher)^2>, the mean over the classes that exist.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    [...]. inf where only one side is -inf; 0 where no class exists.

  Raises:
    ValueError: shapes differ.

  Compares: raw logits, their common offset too
  Shapes: [..., C] -> [...]
  Use: regression to logits; the limit of kl_divergence at a high temperature, with its offset
  Weight: 1
  Source: Ba & Caruana 2014, arXiv:1312.6184

  >>> logit_mse(jnp.array([1., 2.]), jnp.array([1., 4.]))
  Array(2., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  _checks.axis(axis, student.shape)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  exists = jnp.maximum(student, teacher) != -jnp.inf
  exists = exists if mask is None else exists & mask
  used = exists & (jnp.minimum(student, teacher) != -jnp.inf)
  error = jnp.where(used, student, 0) - jnp.where(used, teacher, 0)
  squares = jnp.where(exists & ~used, jnp.inf, error**2).sum(axis)
  return squares / jnp.maximum(exists.sum(axis, dtype=squares.dtype), 1)


def margin_mse(
  student: ArrayLike, teacher: ArrayLike, *, class_mask: ArrayLike | None = None
) -> jax.Array:
  """<((s_0 - s_j) - (t_0 - t_j))^2> over the negatives j = 1, ..., K - 1 that exist.

  Scores of a query's positive (candidate 0) and of its negatives: what is compared is by how much
  the positive is ahead, so the two sides may score on different offsets, not on different scales.
  The paper has one negative, K = 2.

  Args:
    student: scores [..., K], the positive first.
    teacher: scores of the same shape.
    class_mask: candidates that exist, bool, broadcastable to the scores; one with -inf on both
      sides does not exist either.

  Returns:
    [...]. inf where only one side is -inf; 0 without the positive, or without a negative.

  Raises:
    ValueError: shapes differ, or K < 2.

  Compares: margins between the scores of a positive and of negatives
  Shapes: [..., K] -> [...]
  Use: retrieval, a cross-encoder or a larger encoder as the teacher of (query, positive, negatives)
  Weight: 1
  Source: MarginMSE, Hofstaetter et al. 2020, equation 4, arXiv:2010.02666

  >>> margin_mse(jnp.array([3., 1.]), jnp.array([9., 4.]))
  Array(9., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  if student.shape[-1] < 2:
    raise ValueError(
      f"student: expected scores of at least 2 classes, a positive and a negative, got shape "
      f"{student.shape}"
    )
  mask = _checks.mask("class_mask", class_mask, student.shape)
  exists = jnp.maximum(student, teacher) != -jnp.inf
  exists = exists if mask is None else exists & mask
  used = exists & (jnp.minimum(student, teacher) != -jnp.inf)
  s, t = (jnp.where(used, x, 0) for x in (student, teacher))
  difference = (s[..., :1] - s[..., 1:]) - (t[..., :1] - t[..., 1:])
  counted = exists[..., :1] & exists[..., 1:]
  is_finite = used[..., :1] & used[..., 1:]
  squares = jnp.where(is_finite, difference, 0) ** 2
  squares = jnp.where(counted & ~is_finite, jnp.inf, squares).sum(-1)
  return squares / jnp.maximum(counted.sum(-1, dtype=squares.dtype), 1)


def hard_distillation(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  label_smoothing: Scalar = 0.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """Cross entropy of the student at argmax(teacher), at T = 1: the teacher's decision as a label.

  Ties go to the first class. The teacher gets no gradient, since argmax has none.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    label_smoothing: e in [0, 1): the label is 1 - e at the argmax plus e spread over all classes.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, or label_smoothing is not in [0, 1).

  Compares: the student with the teacher's decision
  Shapes: [..., C] -> [...]
  Use: vision transformers with a distillation token; needs no temperature
  Weight: 0.5 in addition to 0.5 x cross entropy
  Source: DeiT, Touvron et al. 2021, arXiv:2012.12877

  >>> hard_distillation(jnp.array([0., 0.]), jnp.array([0., 9.])).round(4)
  Array(0.6931, dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  e = _checks.number(
    "label_smoothing", label_smoothing, student.dtype, low=0, high=1, open_high=True
  )
  mask = _checks.mask("class_mask", class_mask, student.shape)
  _softmax.check_classes(student, axis)
  log_q = _softmax.log_softmax(student, axis, mask)
  z = jnp.moveaxis(teacher if mask is None else jnp.where(mask, teacher, -jnp.inf), axis, -1)
  exists = (log_q != -jnp.inf) | (z != -jnp.inf)
  count = jnp.maximum(exists.sum(-1, keepdims=True, dtype=z.dtype), 1)
  label = jnp.where(_first_max(z), 1 - e, 0) + e / count
  return _softmax.weighted_cross_entropy(jnp.where(exists, label, 0), log_q)


def binary_kl(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 sum_c KL(Bernoulli(sigmoid(t_c / T)) || Bernoulli(sigmoid(s_c / T))).

  Args:
    student: logits [..., C], one yes-or-no question each.
    teacher: logits of the same shape; -inf is a certain no.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...], summed over the classes.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: independent probabilities
  Shapes: [..., C] -> [...]
  Use: multi-label classification and detection heads with sigmoids
  Weight: 1
  Source: multi-label form of Hinton et al. 2015; Yang et al. 2023 (L2D), arXiv:2308.06453

  >>> binary_kl(jnp.array([0.]), jnp.array([jnp.log(3.)])).round(4)
  Array(0.1308, dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  t = _checks.positive("temperature", temperature, student.dtype)
  _checks.axis(axis, student.shape)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  never_s, never_t = student == -jnp.inf, teacher == -jnp.inf
  exists = ~(never_s & never_t) if mask is None else mask & ~(never_s & never_t)
  s = jnp.where(exists & ~never_s, student / t, 0)
  z = jnp.where(exists & ~never_t, teacher / t, 0)
  # Where the teacher's answer is yes, yes and no are swapped: with z <= 0 no large terms cancel.
  s, z = (jnp.where(z > 0, -x, x) for x in (s, z))
  odds, surprise = jnp.exp(z), _softplus(s)
  divergence = odds / (1 + odds) * (z - s) + surprise - jnp.log1p(odds)
  terms = jnp.where(never_t, surprise, jnp.where(never_s, jnp.inf, divergence))
  return t**2 * jnp.where(exists, terms, 0).sum(axis)


def _first_max(x: jax.Array) -> jax.Array:
  """Returns bool, True at argmax(x) over the last axis; XLA's argmax is 10 times slower on CPUs."""
  positions = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  first = jnp.where(x < x.max(-1, keepdims=True), x.shape[-1], positions).min(-1, keepdims=True)
  return positions == first


def _softplus(x: jax.Array) -> jax.Array:
  """Returns log(1 + e^x); `jax.nn.softplus` also handles infinite x and is three times slower."""
  size = jnp.where(x > 0, x, -x)  # The derivative of abs at 0 is 0.
  return jnp.where(x > 0, x, 0) + jnp.log1p(jnp.exp(-size))
