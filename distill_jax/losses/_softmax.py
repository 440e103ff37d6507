"""Softmax in log space where classes may be missing on one side or on both."""

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks


def log_pair(student, teacher, temperature=1.0, axis=-1, class_mask=None):
  """Log-probabilities of both sides at `temperature`, class axis last, and the temperature.

  A class is missing (-inf) where `class_mask` is False or its logit is -inf.

  Returns:
    `(log_q, log_p, temperature)` of the student, of the teacher.
  """
  student, teacher = _checks.pair(student, teacher)
  temperature = _checks.positive("temperature", temperature, student.dtype)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  log_q, log_p = (log_softmax(z / temperature, axis, mask) for z in (student, teacher))
  return log_q, log_p, temperature


def log_softmax(z: jax.Array, axis=-1, mask=None) -> jax.Array:
  """log softmax, `axis` moved last; -inf where a class is missing, also where all of a row are.

  Unlike `jax.nn.log_softmax` its gradient is finite for rows with missing classes. NaN stays NaN.
  """
  z = jnp.moveaxis(z, axis, -1)
  if mask is not None:
    z = jnp.where(jnp.moveaxis(mask, axis, -1), z, -jnp.inf)
  total = log_sum(z)[..., None]
  return z - jnp.where(total == -jnp.inf, 0, total)


def log_sum(log_a: jax.Array) -> jax.Array:
  """log of the sum over the last axis of exp(log_a); -inf, with a zero gradient, where nothing exists."""
  peak = jax.lax.stop_gradient(log_a.max(-1, keepdims=True))
  # No select before the sum: exp(-inf) is the 0 that is wanted, and XLA on CPUs then keeps no copy of log_a.
  total = jnp.exp(log_a - jnp.where(peak == -jnp.inf, 0, peak)).sum(-1)
  return jnp.log(jnp.where(total == 0, 1, total)) + peak[..., 0]


def log_gather(log_a: jax.Array, chosen: jax.Array) -> jax.Array:
  """The one entry of the last axis that the bool array `chosen` marks; -inf where it marks none."""
  return jnp.where(chosen.any(-1), jnp.where(chosen, log_a, 0).sum(-1), -jnp.inf)


def divergence(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """sum a (log a - log b) over the last axis; inf where b is 0 and a is not."""
  return _expect(log_a, log_b, lambda a, b: a - b)


def cross_entropy(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """-sum a log b over the last axis; inf where b is 0 and a is not."""
  return _expect(log_a, log_b, lambda a, b: -b)


def surprise(a: jax.Array, log_b: jax.Array) -> jax.Array:
  """-sum a log b over the last axis for weights a >= 0; inf where b is 0 and a is not."""
  infinite = (a > 0) & (log_b == -jnp.inf)
  terms = -a * jnp.where(log_b == -jnp.inf, 0, log_b)
  return jnp.where(infinite, jnp.inf, terms).sum(-1)


def mixture(log_a: jax.Array, log_b: jax.Array, weight) -> jax.Array:
  """log(weight a + (1 - weight) b), and -inf where both are."""
  exists = (log_a != -jnp.inf) | (log_b != -jnp.inf)
  log_a, log_b = (jnp.where(exists, x, 0) for x in (log_a, log_b))
  return jnp.where(
    exists, jnp.logaddexp(jnp.log(weight) + log_a, jnp.log1p(-weight) + log_b), -jnp.inf
  )


def one_hot(labels, shape: tuple[int, ...]) -> jax.Array:
  """Bool [..., C], all False where a label is outside [0, C)."""
  labels = _checks.integers("labels", labels, shape[:-1])
  return labels[..., None] == jnp.arange(shape[-1])


def with_valid_labels(values, chosen, log_q) -> jax.Array:
  """`values`, NaN where the label is no class that exists; 0 where a row has no class at all.

  jit cannot raise: NaN is what the train step notices, and a row masked out of the mean hides it.
  """
  exists = log_q != -jnp.inf
  known = (chosen & exists).any(-1)
  return jnp.where(known, values, jnp.where(exists.any(-1), jnp.nan, 0))


def _expect(log_a, log_b, f):
  in_a, in_b = log_a != -jnp.inf, log_b != -jnp.inf
  log_a, log_b = (jnp.where(in_a & in_b, x, 0) for x in (log_a, log_b))  # f(0, 0) = 0
  return jnp.where(in_a & ~in_b, jnp.inf, jnp.exp(log_a) * f(log_a, log_b)).sum(-1)
