"""Checks the numbers that terms take, and resolves those that are schedules of the step."""

import contextlib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.Array], Any]
Number = float | jax.Array | Schedule
"""A number, or a schedule `step -> number`: optax's, or any function that jax can trace."""

_TYPES = {
  float: (float, "float", float | jax.Array),
  int: (int, "int"),
  bool: (bool, "bool"),
  str: (str, "str"),
}
_TEXTS = {
  float: "a number such as 1.0, or a schedule step -> number",
  int: "an integer such as 1",
  bool: "True or False",
  str: "a text",
}

_steps: ContextVar[tuple[int, ...]] = ContextVar("_steps", default=(0,))


@contextlib.contextmanager
def schedule_steps(total: int) -> Iterator[None]:
  """Checks schedules inside at the first, the middle and the last of so many steps."""
  token = _steps.set(tuple(sorted({0, total // 2, max(total - 1, 0)})))
  try:
    yield
  finally:
    _steps.reset(token)


def at_step(value: Number, step: jax.Array) -> Any:
  """Returns a number, or a schedule's at this step, float32."""
  if not callable(value):
    return value
  return jnp.asarray(_call(value, step), jnp.float32)


def check_number(
  name: str,
  value: Any,
  *,
  low: float = -math.inf,
  high: float = math.inf,
  open_low: bool = False,
  open_high: bool = False,
) -> None:
  """Checks a finite number in its range, or a schedule by its numbers at step 0, and in
  `schedule_steps` at those steps.

  Args:
    name: the argument's name, for the message.
    value: as a person passed it. Texts and bools are no numbers.
    low, high: smallest and largest number; `open_low` and `open_high` exclude them.

  Raises:
    ValueError: it is neither, or out of range.
  """
  numbers_at = values_at(name, value) if callable(value) else {0: value}
  left = "(" if open_low or low == -math.inf else "["
  right = ")" if open_high or high == math.inf else "]"
  for step, number in numbers_at.items():
    inside = is_number(number) and math.isfinite(number)
    inside = inside and (number > low if open_low else number >= low)
    inside = inside and (number < high if open_high else number <= high)
    if not inside:
      got = f"a schedule that is {number!r} at step {step}" if callable(value) else repr(value)
      raise ValueError(
        f"{name}: expected a number in {left}{low}, {high}{right}, or a schedule step -> number, "
        f"got {got}"
      )


def check_types(function: Callable, values: Mapping[str, Any]) -> frozenset[str]:
  """Checks arguments by the types that a function declares; returns the names of schedules.

  A type is that of the annotation (a number, an integer, a bool or a text), or else of the
  default. A parameter without either takes any value, and a function there is a schedule.

  Raises:
    ValueError: a value of another type, or a schedule of what cannot change while training.
  """
  parameters = inspect.signature(function).parameters
  schedules = set()
  for name, value in values.items():
    kind = _type_of(parameters.get(name))
    if callable(value) and kind in (float, None) and not _takes_function(parameters.get(name)):
      values_at(name, value)
      schedules.add(name)
    elif kind is not None and not _has_type(value, kind):
      got = "a function, and it cannot change while training" if callable(value) else repr(value)
      raise ValueError(f"{name}: expected {_TEXTS[kind]}, got {got}")
  return frozenset(schedules)


def values_at(name: str, schedule: Schedule) -> dict[int, float]:
  """Returns a schedule's numbers by step: at step 0, and in `schedule_steps` at those steps.

  Raises:
    ValueError: jax cannot trace it, or it returns something else than one number.
  """
  return {step: _value_at(name, schedule, step) for step in _steps.get()}


def numbers_at_steps(
  hyperparameters: Mapping[str, Any], schedules: Collection[str]
) -> list[tuple[int, dict[str, Any]]]:
  """Returns (step, hyper-parameters) with the numbers of the schedules at step 0, and in
  `schedule_steps` at those steps.
  """
  numbers = {name: values_at(name, hyperparameters[name]) for name in schedules}
  steps = _steps.get() if numbers else (0,)
  return [
    (step, {**hyperparameters, **{name: values[step] for name, values in numbers.items()}})
    for step in steps
  ]


@contextlib.contextmanager
def step_in_error(step: int, schedules: Collection[str]) -> Iterator[None]:
  """Names the step at which a loss rejects the number of a schedule."""
  try:
    yield
  except ValueError as error:
    if not schedules:
      raise
    raise ValueError(f"{error} (with {', '.join(sorted(schedules))} at step {step})") from error


def check_at_steps(
  loss: Callable, hyperparameters: Mapping[str, Any], schedules: Collection[str], *arrays: Any
) -> None:
  """Checks what a loss of a term takes as hyper-parameters.

  Args:
    loss: `(*arrays, **hyperparameters) -> values`; only shapes are computed.
    hyperparameters: numbers and schedules.
    schedules: which of them are schedules; checked as in `numbers_at_steps`.
    *arrays: shapes.

  Raises:
    ValueError: what the loss raises; it names the step.
  """
  for step, constants in numbers_at_steps(hyperparameters, schedules):
    with step_in_error(step, schedules):
      jax.eval_shape(functools.partial(loss, **constants), *arrays)


def _value_at(name: str, schedule: Schedule, step: int) -> float:
  try:
    shape = jax.eval_shape(lambda step: _call(schedule, step), jax.ShapeDtypeStruct((), jnp.int32))
    with jax.ensure_compile_time_eval():
      value = _call(schedule, jnp.asarray(step, jnp.int32))
  except Exception as error:
    title = getattr(schedule, "__name__", type(schedule).__name__)
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    raise ValueError(
      f"{name}: expected a number or a schedule step -> number that jax can trace, got {title}, "
      f"which raises {text}: use optax.linear_schedule or jnp.where(step < 1000, a, b)"
    ) from error
  if not is_number(value):
    axes = getattr(shape, "shape", ())
    got = f"an array of shape {axes}" if axes else repr(value)
    raise ValueError(f"{name}: expected a schedule that returns one number, got {got}")
  return float(value)


def _call(schedule: Schedule, step: jax.Array) -> Any:
  with jax.numpy_dtype_promotion("standard"):  # Optax divides integer steps.
    return schedule(step)


def is_number(value: Any) -> bool:
  """Returns whether a value is a real number or an array of one; bools and texts are none."""
  if isinstance(value, (jax.Array, np.ndarray)):
    dtype = value.dtype
    return value.ndim == 0 and any(jnp.issubdtype(dtype, k) for k in (jnp.floating, jnp.integer))
  return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def is_integer(value: Any) -> bool:
  """Returns whether a value is an integer; bools are none."""
  return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _has_type(value: Any, kind: type) -> bool:
  if kind is float:
    return is_number(value)
  return is_integer(value) if kind is int else isinstance(value, kind)


def _takes_function(parameter: inspect.Parameter | None) -> bool:
  """Returns whether a parameter's default is a function, such as an activation's."""
  default = inspect.Parameter.empty if parameter is None else parameter.default
  return callable(default) and default is not inspect.Parameter.empty


def _type_of(parameter: inspect.Parameter | None) -> type | None:
  """Returns float, int, bool or str, as a parameter declares; None: any type."""
  if parameter is None:
    return None
  for kind, annotations in _TYPES.items():
    if parameter.annotation in annotations:
      return kind
  if parameter.annotation is not inspect.Parameter.empty:
    return None
  kind = type(parameter.default)
  return float if kind is int else kind if kind in _TYPES else None
