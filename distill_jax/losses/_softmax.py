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
  student, teacher = _checks.pair(student, teacher)
  temperature = _checks.positive("temperature", temperature, student.dtype)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  log_q, log_p = (log_softmax(z / temperature, axis, mask) for z in (student, teacher))
  return log_q, log_p, temperature


def log_softmax(z: jax.Array, axis: int = -1, mask: jax.Array | None = None) -> jax.Array:
  """Returns log softmax, `axis` moved last; -inf at missing classes, also where all are missing.

  Unlike `jax.nn.log_softmax` its gradient is finite for rows with missing classes. NaN stays NaN.
  """
  z = jnp.moveaxis(z, axis, -1)
  if mask is not None:
    z = jnp.where(jnp.moveaxis(mask, axis, -1), z, -jnp.inf)
  total = log_sum(z)[..., None]
  return z - jnp.where(total == -jnp.inf, 0, total)


def log_sum(log_a: jax.Array) -> jax.Array:
  """Returns log sum exp over the last axis; -inf, with a zero gradient, where all are -inf."""
  peak = jax.lax.stop_gradient(log_a.max(-1, keepdims=True))
  # No select before the sum: exp(-inf) is already 0, and XLA on CPUs then keeps no copy of log_a.
  total = jnp.exp(log_a - jnp.where(peak == -jnp.inf, 0, peak)).sum(-1)
  return jnp.log(jnp.where(total == 0, 1, total)) + peak[..., 0]


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
  labels = _checks.integers("labels", labels, shape[:-1])
  return labels[..., None] == jnp.arange(shape[-1])


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
