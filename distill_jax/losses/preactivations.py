"""Losses on features before their ReLU: what the sign says, and what is left of a negative value."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses import _checks


def activation_boundary(student, teacher, *, margin=1.0) -> jax.Array:
  """Sum of squared hinges on the sign of the teacher: (s + m)^2 where t <= 0 < s + m, (s - m)^2 where t > 0.

  Args:
    student: pre-activations [B, ...], through a learned connector.
    teacher: pre-activations of the same shape.
    margin: m >= 0, may be traced.

  Returns:
    [B], summed over all positions. A student equal to its teacher pays where |t| < m.

  Raises:
    ValueError: shapes differ, or margin < 0.

  Compares: signs of pre-activations
  Shapes: [B, ...] -> [B]
  Use: before training proper, to start the student
  Weight: 1/1000 (3/1000 in the papers' comparison code)
  Source: AB, Heo et al. 2019, arXiv:1811.03233

  >>> activation_boundary(jnp.array([[0., 3.]]), jnp.array([[2., -1.]]))
  Array([17.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  margin = _checks.number("margin", margin, student.dtype, low=0)
  hinge = jnp.where(teacher > 0, margin - student, margin + student)
  return _checks.per_example(jnp.maximum(hinge, 0) ** 2, total=True)


def ofd(student, teacher, margin) -> jax.Array:
  """Sum of the partial L2 distance to max(t, margin): nothing to pay where both are below it or negative.

  (s - t')^2 with t' = max(t, margin), except 0 where t' <= 0 and s <= t'.

  Args:
    student: pre-activations [B, ..., C], through a learned connector.
    teacher: pre-activations of the same shape.
    margin: negative margins [C], from `ofd_margin`.

  Returns:
    [B], summed over all positions.

  Raises:
    ValueError: shapes differ, or margin is not [C].

  Compares: pre-activations, negative ones as "off"
  Shapes: [B, ..., C], margin [C] -> [B]
  Use: convolutional networks with batch norm, before the ReLU that ends each stage
  Weight: 1e-3, halved for each earlier stage
  Source: OFD, Heo et al. 2019, arXiv:1904.01866

  >>> ofd(jnp.array([[1., -5.]]), jnp.array([[3., -9.]]), jnp.array([-1., -1.]))
  Array([4.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=2)
  margin = _checks.array("margin", margin).astype(student.dtype)
  if margin.shape != student.shape[-1:]:
    raise ValueError(f"margin {margin.shape} must have one value a channel, {student.shape[-1:]}")
  target = jnp.maximum(teacher, margin)
  paid = (student > target) | (target > 0)
  return _checks.per_example(jnp.where(paid, student - target, 0) ** 2, total=True)


def ofd_margin(scale, bias) -> jax.Array:
  """The mean of the negative part of a normal variable per channel: E[x | x < 0], x ~ N(bias, scale^2).

  Args:
    scale: of the teacher's batch norm before the ReLU, [C]; its sign does not matter.
    bias: of the same batch norm, [C].

  Returns:
    Margins [C], for `ofd`. Channels that are almost never negative (in fewer than 1 of 1,000) get -3 |scale|,
    as in the reference code.

  Raises:
    ValueError: shapes differ.

  Source: OFD, Heo et al. 2019, arXiv:1904.01866

  >>> ofd_margin(jnp.array([1.]), jnp.array([9.]))
  Array([-3.], dtype=float32)
  """
  scale, bias = (_checks.array(name, x) for name, x in (("scale", scale), ("bias", bias)))
  if scale.shape != bias.shape:
    raise ValueError(f"scale {scale.shape} and bias {bias.shape} must have one shape")
  scale = jnp.abs(scale)
  z = bias / jnp.where(scale > 0, scale, 1)
  log_negative = jax.scipy.stats.norm.logcdf(-z)
  mean = bias - scale * jnp.exp(jax.scipy.stats.norm.logpdf(z) - log_negative)
  margin = jnp.where(log_negative > np.log(1e-3), mean, -3 * scale)
  return jnp.where(scale > 0, margin, jnp.minimum(bias, 0))
