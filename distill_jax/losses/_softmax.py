"""Softmax in log space where classes may be missing on one side or on both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks
from distill_jax.losses._checks import Scalar


def log_pair(
  student: ArrayLike,
  teacher: ArrayLike,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array, Scalar]:
  """Returns log-probabilities of student and teacher, class axis last, and the temperature.

  A class is missing (-inf) where `class_mask` is False or its logit is -inf.
  """
  student, teacher = logit_pair(student, teacher, axis, class_mask)
  temperature = _checks.positive("temperature", temperature, student.dtype)
  log_q, log_p = (log_softmax(z, temperature=temperature) for z in (student, teacher))
  return log_q, log_p, temperature


def logit_pair(
  student: ArrayLike, teacher: ArrayLike, axis: int = -1, class_mask: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns the logits of both sides, class axis last; -inf where `class_mask` is False."""
  student, teacher = _checks.pair(student, teacher)
  check_classes(student, axis)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  student, teacher = (_masked(z, axis, mask) for z in (student, teacher))
  return student, teacher


def check_classes(student: jax.Array, axis: int = -1) -> None:
  """Raises ValueError where a softmax has one value, which is 1 whatever the logit is."""
  _checks.axis(axis, student.shape)
  if student.shape[axis] < 2:
    raise ValueError(
      f"student: expected at least 2 classes along axis {axis}, got shape {student.shape}: one "
      "logit takes losses.binary_kl, or give the model two"
    )


def log_softmax(
  z: jax.Array, axis: int = -1, mask: jax.Array | None = None, temperature: Scalar = 1.0
) -> jax.Array:
  """Returns log softmax of z / temperature, `axis` moved last; -inf at missing classes.

  A row may have no class at all. Unlike `jax.nn.log_softmax` the gradient is finite for rows with
  missing classes. NaN stays NaN.
  """
  z = centered(_masked(z, axis, mask)) / temperature
  total = jnp.exp(z).sum(-1, keepdims=True)
  return z - jnp.log(jnp.where(total == 0, 1, total))


def centered(z: jax.Array) -> jax.Array:
  """Returns z minus its largest value along the last axis, a constant; z where all are -inf.

  What follows keeps the digits of the logits' differences, whatever constant they share: divided by
  a temperature or added to a log sum, logits of 10,000 have an error of 1e-3.
  """
  peak = jax.lax.stop_gradient(z.max(-1, keepdims=True))
  return z - jnp.where(peak == -jnp.inf, 0, peak)


def log_sum(log_a: jax.Array) -> jax.Array:
  """Returns log sum exp over the last axis; -inf, with a zero gradient, where all are -inf."""
  peak = jax.lax.stop_gradient(log_a.max(-1))
  # No select before the sum: exp(-inf) is already 0, and XLA on CPUs then keeps no copy of log_a.
  total = jnp.exp(centered(log_a)).sum(-1)
  return jnp.log(jnp.where(total == 0, 1, total)) + peak


def log_gather(log_a: jax.Array, one_hot: jax.Array) -> jax.Array:
  """Returns the entry of the last axis that `one_hot` (bool) marks; -inf where it marks none."""
  return jnp.where(one_hot.any(-1), jnp.where(one_hot, log_a, 0).sum(-1), -jnp.inf)


def without(log_a: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns log_a with -inf at the indices."""
  zeros = jnp.zeros(log_a.shape, bool)
  marked = jnp.put_along_axis(zeros, indices, True, -1, inplace=False, mode="drop")
  return jnp.where(marked, -jnp.inf, log_a)


def divergence(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """Returns sum a (log a - log b) over the last axis; inf where b is 0 and a is not."""
  return _expectation(log_a, log_b, lambda a, b: a - b)


def cross_entropy(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """Returns -sum a log b over the last axis; inf where b is 0 and a is not."""
  return _expectation(log_a, log_b, lambda a, b: -b)


def weighted_cross_entropy(weights: jax.Array, log_b: jax.Array) -> jax.Array:
  """Returns -sum weights log b, weights >= 0; inf where b is 0 and its weight is not."""
  infinite = (weights > 0) & (log_b == -jnp.inf)
  terms = -weights * jnp.where(log_b == -jnp.inf, 0, log_b)
  return jnp.where(infinite, jnp.inf, terms).sum(-1)


def mixture(log_a: jax.Array, log_b: jax.Array, weight: Scalar) -> jax.Array:
  """Returns log(weight a + (1 - weight) b), -inf where both are."""
  exists = (log_a != -jnp.inf) | (log_b != -jnp.inf)
  log_a, log_b = (jnp.where(exists, x, 0) for x in (log_a, log_b))
  return jnp.where(
    exists, jnp.logaddexp(jnp.log(weight) + log_a, jnp.log1p(-weight) + log_b), -jnp.inf
  )


def one_hot(labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
  """Returns bool [..., C], all False where a label is outside [0, C)."""
  return is_class(_checks.integers("labels", labels, shape[:-1]), shape[-1])


def is_class(labels: jax.Array, num_classes: int) -> jax.Array:
  """Returns bool [..., num_classes], all False where a label is outside [0, num_classes)."""
  shape = (*labels.shape, num_classes)
  return labels[..., None] == jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim)


def nan_at_invalid_labels(values: jax.Array, one_hot: jax.Array, log_q: jax.Array) -> jax.Array:
  """Returns `values`; NaN where the label is no existing class, 0 where a row has no class at all.

  jit cannot raise: NaN is what the train step reports, and a row masked out of the mean hides it.
  """
  exists = log_q != -jnp.inf
  is_valid = (one_hot & exists).any(-1)
  return jnp.where(is_valid, values, jnp.where(exists.any(-1), jnp.nan, 0))


def _expectation(
  log_a: jax.Array, log_b: jax.Array, f: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
  """Returns sum a f(log a, log b), f(0, 0) = 0; inf where b is 0 and a is not."""
  in_a = log_a != -jnp.inf
  in_b = log_b != -jnp.inf
  log_a, log_b = (jnp.where(in_a & in_b, x, 0) for x in (log_a, log_b))
  return jnp.where(in_a & ~in_b, jnp.inf, jnp.exp(log_a) * f(log_a, log_b)).sum(-1)


def _masked(z: jax.Array, axis: int, mask: jax.Array | None) -> jax.Array:
  """Returns z with `axis` last and -inf where the mask is False."""
  return jnp.moveaxis(z if mask is None else jnp.where(mask, z, -jnp.inf), axis, -1)
