"""Losses on features before their ReLU: their signs, and partial distances of negative values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax.losses import _checks
from distill_jax.losses._checks import Scalar


def activation_boundary(
  student: ArrayLike, teacher: ArrayLike, *, margin: Scalar = 1.0
) -> jax.Array:
  """Sum of squared hinges on the teacher's sign: (s + m)^2 where t <= 0, (s - m)^2 where t > 0.

  Each counts only on the other side of its margin: s > -m, and s < m.

  Args:
    student: pre-activations [B, ...], through a learned connector.
    teacher: pre-activations of the same shape.
    margin: m >= 0, may be traced.

  Returns:
    [B], summed over all positions. A student equal to its teacher has a loss > 0 where |t| < m.

  Raises:
    ValueError: shapes differ, or margin < 0.

  Compares: signs of pre-activations
  Shapes: [B, ...] -> [B]
  Use: before the main training, to initialize the student
  Weight: 1/1000 (3/1000 in the papers' comparison code)
  Source: AB, Heo et al. 2019, arXiv:1811.03233

  >>> activation_boundary(jnp.array([[0., 3.]]), jnp.array([[2., -1.]]))
  Array([17.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  margin = _checks.number("margin", margin, student.dtype, low=0)
  hinge = jnp.where(teacher > 0, margin - student, margin + student)
  return _checks.per_example(jnp.maximum(hinge, 0) ** 2, total=True)


def ofd(student: ArrayLike, teacher: ArrayLike, margin: ArrayLike) -> jax.Array:
  """Sum of (s - t')^2 with t' = max(t, margin), except 0 where t' <= 0 and s <= t'.  Args:
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
    raise ValueError(
      f"margin: expected one value a channel, {student.shape[-1:]}, got {margin.shape}"
    )
  target = jnp.maximum(teacher, jnp.broadcast_to(margin, teacher.shape))
  counts = (student > target) | (target > 0)
  return _checks.per_example(jnp.where(counts, student - target, 0) ** 2, total=True)


def ofd_margin(scale: ArrayLike, bias: ArrayLike) -> jax.Array:
  """Returns the mean of a normal variable's negative part: E[x | x < 0], x ~ N(bias, scale^2).

  Args:
    scale: scale of the teacher's batch norm before the ReLU, [C]; its sign has no effect.
    bias: bias of the same batch norm, [C].

  Returns:
    Margins [C], for `ofd`. Channels that are almost never negative (in fewer than 1 of 1,000) get
    -3 |scale|, as in the reference code.

  Raises:
    ValueError: shapes differ.

  Source: OFD, Heo et al. 2019, arXiv:1904.01866

  >>> ofd_margin(jnp.array([1.]), jnp.array([9.]))
  Array([-3.], dtype=float32)
  """
  scale, bias = (_checks.array(name, x) for name, x in (("scale", scale), ("bias", bias)))
  if scale.shape != bias.shape:
    raise ValueError(f"bias: expected the shape of scale, {scale.shape}, got {bias.shape}")
  scale = jnp.abs(scale)
  z = bias / jnp.where(scale > 0, scale, 1)
  log_negative = jax.scipy.stats.norm.logcdf(-z)
  mean = bias - scale * jnp.exp(jax.scipy.stats.norm.logpdf(z) - log_negative)
  margin = jnp.where(log_negative > np.log(1e-3), mean, -3 * scale)
  return jnp.where(scale > 0, margin, jnp.minimum(bias, 0))
