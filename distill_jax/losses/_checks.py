"""What every loss asks of its arguments: equal shapes, float32 or wider, hyper-parameters in their range."""

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST  # a TPU multiplies matrices in bfloat16 unless asked


def pair(student, teacher, *, ndim=1, exactly=None, leading=None) -> tuple[jax.Array, jax.Array]:
  """Both arrays in their common dtype, float32 or wider, after a check of their shapes.

  Args:
    student: an array.
    teacher: an array.
    ndim: least number of axes.
    exactly: the number of axes.
    leading: how many leading axes must agree; None: the whole shape.
  """
  student, teacher = array("student", student), array("teacher", teacher)
  same = student.shape[:leading] == teacher.shape[:leading] and student.ndim == teacher.ndim
  if not same:
    wanted = "one shape" if leading is None else f"the same first {leading} axes and number of axes"
    raise ValueError(
      f"student {student.shape} and teacher {teacher.shape} must have {wanted}: nothing is broadcast"
    )
  array("student", student, ndim=ndim, exactly=exactly)
  dtype = jnp.promote_types(student.dtype, teacher.dtype)
  return student.astype(dtype), teacher.astype(dtype)


def array(name: str, value, *, ndim=0, exactly=None) -> jax.Array:
  """One array in float32 or wider, not empty, with at least `ndim` (or `exactly`) axes."""
  value = jnp.asarray(value)
  if value.ndim < ndim or (exactly is not None and value.ndim != exactly):
    wanted = f"at least {ndim}" if exactly is None else f"{exactly}"
    raise ValueError(f"{name} {value.shape} has {value.ndim} axes, expected {wanted}")
  if 0 in value.shape:
    raise ValueError(f"{name} {value.shape} is empty")
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def number(name: str, value, dtype, *, low=-np.inf, high=np.inf, open_low=False, open_high=False):
  """A finite scalar in its range. A traced one (a schedule under jit) is taken on trust.

  Args:
    name: for the message.
    value: a Python number or a scalar array, traced or not.
    dtype: of a traced one, so that it widens nothing; any other becomes a Python float.
    low: smallest value; `open_low` excludes it.
    high: largest value; `open_high` excludes it.
  """
  if jnp.ndim(value) != 0:
    raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
  if isinstance(value, jax.core.Tracer):
    return value.astype(dtype)
  value = float(value)
  inside = (value > low if open_low else value >= low) and (
    value < high if open_high else value <= high
  )
  if not (inside and np.isfinite(value)):
    left, right = (
      "(" if open_low or low == -np.inf else "[",
      ")" if open_high or high == np.inf else "]",
    )
    raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value}")
  return value


def positive(name: str, value, dtype):
  """A scalar > 0."""
  return number(name, value, dtype, low=0, open_low=True)


def mask(name: str, value, shape: tuple[int, ...]) -> jax.Array | None:
  """A bool array broadcast to `shape`; None stays None."""
  if value is None:
    return None
  value = jnp.asarray(value)
  if value.dtype != jnp.bool_:
    raise ValueError(f"{name} must be bool, got {value.dtype}: write `{name}={name} > 0`")
  try:
    return jnp.broadcast_to(value, shape)
  except ValueError:
    raise ValueError(f"{name} {value.shape} does not broadcast to {shape}") from None


def integers(name: str, value, shape: tuple[int, ...]) -> jax.Array:
  """An integer array of exactly `shape`."""
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {value.dtype}")
  if value.shape != shape:
    raise ValueError(f"{name} {value.shape} must have the shape {shape}")
  return value


def per_example(values: jax.Array, total=False) -> jax.Array:
  """The mean (or sum) over all elements of one example: [B, ...] -> [B]."""
  flat = values.reshape(values.shape[0], -1)
  return flat.sum(-1) if total else flat.mean(-1)


def unit(x: jax.Array, axis=-1) -> jax.Array:
  """x over its L2 norm along `axis`; zeros, and a zero gradient, where the norm is zero.

  Scaled by the largest entry first, so that squares neither overflow nor underflow.
  """
  peak = jax.lax.stop_gradient(
    jnp.abs(x).max(axis, keepdims=True)
  )  # it cancels: no gradient is lost
  x = x / jnp.where(peak > 0, peak, 1)
  square = (x * x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.where(peak > 0, square, 1))


def root(x: jax.Array) -> jax.Array:
  """The square root, 0 with a zero gradient at 0."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def smooth_l1(x: jax.Array) -> jax.Array:
  """x^2 / 2 inside [-1, 1], |x| - 1/2 outside."""
  size = jnp.abs(x)
  inner = jnp.minimum(size, 1)
  return inner * (size - inner / 2)
