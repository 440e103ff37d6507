"""Checks the arguments of losses: shapes, dtypes and the ranges of hyper-parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from distill_jax import reduce

HIGHEST = jax.lax.Precision.HIGHEST  # A TPU multiplies matrices in bfloat16 unless asked.

Scalar = float | jax.Array
"""A hyper-parameter: a number, or a traced scalar (a schedule under jit)."""


def pair(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  ndim: int = 1,
  exactly: int | None = None,
  leading: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns both arrays in their common dtype, float32 or wider, after a check of their shapes.

  Args:
    student: an array.
    teacher: an array.
    ndim: least number of axes.
    exactly: number of axes; None accepts any number from `ndim` on.
    leading: number of leading axes that must agree; None compares the full shapes.

  Raises:
    ValueError: shapes differ, an array is empty, or the number of axes is another.
  """
  student = array("student", student)
  teacher = array("teacher", teacher)
  if student.shape[:leading] != teacher.shape[:leading] or student.ndim != teacher.ndim:
    expected = "shape" if leading is None else f"first {leading} axes and number of axes"
    raise ValueError(
      f"student: expected the teacher's {expected}, got student {student.shape} and teacher "
      f"{teacher.shape}: nothing is broadcast"
    )
  array("student", student, ndim=ndim, exactly=exactly)
  return same_dtype(student, teacher)


def maps(student: ArrayLike, teacher: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Returns maps [B, ..., H, W, C] and [B, ..., H, W, D], checked like `pair`."""
  return pair(student, teacher, ndim=4, leading=max(jnp.ndim(student) - 1, 1))


def images(name: str, value: ArrayLike) -> jax.Array:
  """Returns maps [B, H, W, C], checked like `array`."""
  shape = jnp.shape(value)
  if len(shape) == 5:
    raise ValueError(
      f"{name}: expected maps [B, H, W, C], got {shape}: for volumes and clips use a loss of maps "
      "of any number of axes, such as losses.hint or losses.cwd"
    )
  return array(name, value, exactly=4)


def positions(x: jax.Array) -> jax.Array:
  """Flattens the axes between the first and the last: [B, ..., C] -> [B, P, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def same_dtype(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns both arrays in their common dtype."""
  dtype = reduce.common_dtype(student.dtype, teacher.dtype)
  return student.astype(dtype), teacher.astype(dtype)


def array(name: str, value: ArrayLike, *, ndim: int = 0, exactly: int | None = None) -> jax.Array:
  """Returns `value` in float32 or wider; raises where it is empty or has another number of axes."""
  value = jnp.asarray(value)
  if value.ndim < ndim or (exactly is not None and value.ndim != exactly):
    expected = f"at least {ndim}" if exactly is None else f"{exactly}"
    raise ValueError(f"{name}: expected {expected} axes, got shape {value.shape}")
  if 0 in value.shape:
    raise ValueError(f"{name}: expected at least one value, got shape {value.shape}")
  return value.astype(reduce.common_dtype(value.dtype, jnp.float32))


def number(
  name: str,
  value: Scalar,
  dtype: DTypeLike,
  *,
  low: float = -np.inf,
  high: float = np.inf,
  open_low: bool = False,
  open_high: bool = False,
) -> Scalar:
  """Returns a finite scalar in its range. A traced one cannot be checked.

  Args:
    name: the argument's name, for the message.
    value: a Python number or a scalar array, traced or not.
    dtype: dtype of a traced value, so that it widens nothing; any other becomes a Python float.
    low: smallest value; `open_low` excludes it.
    high: largest value; `open_high` excludes it.
    open_low: exclude `low`.
    open_high: exclude `high`.

  Raises:
    ValueError: `value` is not a scalar, not finite or outside the range.
  """
  if jnp.ndim(value) != 0:
    raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(value)}")
  if isinstance(value, jax.core.Tracer):
    return value.astype(dtype)
  value = float(value)
  above = value > low if open_low else value >= low
  below = value < high if open_high else value <= high
  if not (above and below and np.isfinite(value)):
    left = "(" if open_low or low == -np.inf else "["
    right = ")" if open_high or high == np.inf else "]"
    raise ValueError(f"{name}: expected a number in {left}{low}, {high}{right}, got {value}")
  return value


def positive(name: str, value: Scalar, dtype: DTypeLike) -> Scalar:
  """Returns a scalar > 0, checked like `number`."""
  return number(name, value, dtype, low=0, open_low=True)


def mask(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
  """Returns a bool array broadcast to `shape`; None stays None."""
  if value is None:
    return None
  value = jnp.asarray(value)
  if value.dtype != jnp.bool_:
    is_indices = value.ndim == 1 and value.shape != shape[-1:]  # [0, 2] of more than 2 classes.
    flags = f"np.isin(np.arange({shape[-1]}), {name})" if is_indices else f"{name} > 0"
    raise ValueError(f"{name}: expected bool, got {value.dtype}: write `{name}={flags}`")
  try:
    return jnp.broadcast_to(value, shape)
  except ValueError:
    raise ValueError(
      f"{name}: expected a shape that broadcasts to {shape}, got {value.shape}"
    ) from None


def axis(value: int, shape: tuple[int, ...]) -> None:
  """Raises ValueError where an array of this shape has no such axis."""
  is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not is_integer or not -len(shape) <= value < len(shape):
    raise ValueError(
      f"axis: expected an integer from {-len(shape)} to {len(shape) - 1} for shape {shape}, got "
      f"{value!r}: the last axis is -1"
    )


def integers(name: str, value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
  """Returns an array of exactly `shape` in jax's default integers: 8 bits cannot count classes."""
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(f"{name}: expected integers, got {value.dtype}: write {name}.astype(np.int32)")
  if value.shape != shape:
    hint = ""
    if value.shape == (*shape, 1):
      hint = f": drop the last axis, {name}[..., 0]"
    elif value.shape[:-1] == shape:
      hint = f": write {name}.argmax(-1) for one-hot rows"
    raise ValueError(f"{name}: expected shape {shape}, got {value.shape}{hint}")
  return value.astype(int)


def per_example(values: jax.Array, total: bool = False) -> jax.Array:
  """Returns the mean, or with `total` the sum, over all elements of an example: [B, ...] -> [B]."""
  flat = values.reshape(values.shape[0], -1)
  return flat.sum(-1) if total else flat.mean(-1)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
  """Returns x over its L2 norm along `axis`; zeros, with a zero gradient, where the norm is zero.

  x is scaled by its largest entry first, so that squares neither overflow nor underflow.
  """
  # The scale cancels, so that stop_gradient loses nothing.
  peak = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True))
  x = x / jnp.where(peak > 0, peak, 1)
  square = (x * x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.where(peak > 0, square, 1))


def root(x: jax.Array) -> jax.Array:
  """Returns the square root, 0 with a zero gradient at 0."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def smooth_l1(x: jax.Array) -> jax.Array:
  """Returns x^2 / 2 inside [-1, 1] and |x| - 1/2 outside."""
  size = jnp.abs(x)
  inner = jnp.minimum(size, 1)
  return inner * (size - inner / 2)
