"""What every loss asks of its arguments: equal shapes, float32 or wider, hyper-parameters in their range."""

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST  # a TPU multiplies matrices in bfloat16 unless asked


def pair(student, teacher, *, ndim: int = 1, names=("student", "teacher")) -> tuple[jax.Array, jax.Array]:
  """Both arrays in their common dtype, float32 or wider; one shape, not empty, at least `ndim` axes."""
  student, teacher = jnp.asarray(student), jnp.asarray(teacher)
  if student.shape != teacher.shape:
    raise ValueError(
      f"{names[0]} {student.shape} and {names[1]} {teacher.shape} must have one shape: nothing is broadcast"
    )
  dtype = jnp.promote_types(jnp.promote_types(student.dtype, teacher.dtype), jnp.float32)
  return array(names[0], student, ndim=ndim).astype(dtype), array(names[1], teacher, ndim=ndim).astype(dtype)


def array(name: str, value, *, ndim: int = 1, exactly: int | None = None) -> jax.Array:
  """One array in float32 or wider, not empty, with at least `ndim` (or `exactly`) axes."""
  value = jnp.asarray(value)
  if value.ndim < ndim or (exactly is not None and value.ndim != exactly):
    wanted = f"at least {ndim}" if exactly is None else f"{exactly}"
    raise ValueError(f"{name} {value.shape} has {value.ndim} axes, expected {wanted}")
  if 0 in value.shape:
    raise ValueError(f"{name} {value.shape} is empty")
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def number(
  name: str, value, dtype, *, low=-np.inf, high=np.inf, open_low=False, open_high=False
) -> jax.Array:
  """A scalar in its range, as `dtype`. A traced one (a schedule under jit) is taken on trust.

  Args:
    name: for the message.
    value: a Python number or a scalar array, traced or not.
    dtype: of the result, so that it widens nothing.
    low: smallest value; `open_low` excludes it.
    high: largest value; `open_high` excludes it.
  """
  if jnp.ndim(value) != 0:
    raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
  if not isinstance(value, jax.core.Tracer):
    v = float(value)
    inside = (v > low if open_low else v >= low) and (v < high if open_high else v <= high)
    if not (inside and np.isfinite(v)):
      raise ValueError(
        f"{name} must be in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}, got {v}"
      )
  return jnp.asarray(value, dtype)


def positive(name: str, value, dtype) -> jax.Array:
  """A scalar > 0, as `dtype`."""
  return number(name, value, dtype, low=0, open_low=True, open_high=True)


def mean_per_example(values: jax.Array) -> jax.Array:
  """The mean over all elements of one example: [B, ...] -> [B]."""
  return values.reshape(values.shape[0], -1).mean(-1)


def unit(x: jax.Array, axis=-1) -> jax.Array:
  """x over its L2 norm along `axis`; zeros (and a zero gradient) where the norm is zero.

  Scaled by the largest entry first, so that squares neither overflow nor underflow.
  """
  peak = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True))
  x = x / jnp.where(peak > 0, peak, 1)
  square = (x * x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.where(peak > 0, square, 1))
