"""Softmax in log space where classes may be missing on one side or on both."""

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks


def log_pair(student, teacher, *, temperature=1.0, axis=-1, class_mask=None):
  """Log-probabilities of both sides at `temperature`, class axis last, and the temperature as an array.

  A class is missing (-inf) where `class_mask` is False or its logit is -inf.

  Returns:
    `(log_q, log_p, temperature)` of the student, of the teacher.
  """
  student, teacher = _checks.pair(student, teacher)
  temperature = _checks.positive("temperature", temperature, student.dtype)
  mask = spread_mask(class_mask, student.shape)
  log_q, log_p = (log_softmax(z / temperature, axis, mask) for z in (student, teacher))
  return log_q, log_p, temperature


def spread_mask(class_mask, shape):
  """`class_mask` broadcast to the logits' shape; None stays None."""
  if class_mask is None:
    return None
  class_mask = jnp.asarray(class_mask)
  if class_mask.dtype != jnp.bool_:
    raise ValueError(f"class_mask must be bool, got {class_mask.dtype}")
  try:
    return jnp.broadcast_to(class_mask, shape)
  except ValueError:
    raise ValueError(f"class_mask {class_mask.shape} does not broadcast to the logits {shape}") from None


def log_softmax(z: jax.Array, axis=-1, mask=None) -> jax.Array:
  """log softmax, `axis` moved last; -inf where a class is missing, also where all of a row are.

  Unlike `jax.nn.log_softmax` its gradient is finite for rows with missing classes. NaN stays NaN.
  """
  z = jnp.moveaxis(z, axis, -1)
  exists = z != -jnp.inf
  if mask is not None:
    exists &= jnp.moveaxis(mask, axis, -1)
  z = jnp.where(exists, z, 0)
  z = z - jax.lax.stop_gradient(
    jnp.where(exists, z, -jnp.inf).max(-1, keepdims=True, initial=jnp.finfo(z.dtype).min)
  )
  total = jnp.where(exists, jnp.exp(jnp.where(exists, z, 0)), 0).sum(-1, keepdims=True)
  return jnp.where(exists, z - jnp.log(jnp.where(total == 0, 1, total)), -jnp.inf)


def divergence(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """sum a (log a - log b) over the last axis; inf where b is 0 and a is not."""
  return _expect(log_a, log_b, lambda a, b: a - b)


def cross_entropy(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """-sum a log b over the last axis; inf where b is 0 and a is not."""
  return _expect(log_a, log_b, lambda a, b: -b)


def mixture(log_a: jax.Array, log_b: jax.Array, weight) -> jax.Array:
  """log(weight a + (1 - weight) b), and -inf where both are."""
  exists = (log_a != -jnp.inf) | (log_b != -jnp.inf)
  log_a, log_b = (jnp.where(exists, x, 0) for x in (log_a, log_b))
  return jnp.where(exists, jnp.logaddexp(jnp.log(weight) + log_a, jnp.log1p(-weight) + log_b), -jnp.inf)


def _expect(log_a, log_b, f):
  infinite = (log_a != -jnp.inf) & (log_b == -jnp.inf)
  used = (log_a != -jnp.inf) & ~infinite
  log_a, log_b = (jnp.where(used, x, 0) for x in (log_a, log_b))
  terms = jnp.where(used, jnp.exp(log_a) * f(log_a, log_b), 0)
  return jnp.where(infinite, jnp.inf, terms).sum(-1)
