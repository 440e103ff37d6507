"""Checks the function that a term takes as its loss, and the values that it returns."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.errors import suggest
from distill_jax.objectives.hyperparameters import check_types


def check_loss(loss: Any) -> None:
  """Checks that a loss is a function of the student and the teacher, in this order.

  Raises:
    ValueError: it is something else; the nearest loss is named.
  """
  if isinstance(loss, str):
    names = [name for name in losses.__all__ if name.islower()]
    raise ValueError(
      f"loss: expected a function such as losses.kl_divergence, got {loss!r}{_hint(loss, names)}"
    )
  if not callable(loss) or inspect.isclass(loss):
    got = f"the class {loss.__name__}" if inspect.isclass(loss) else f"a {type(loss).__name__}"
    raise ValueError(
      f"loss: expected a function (student, teacher) -> values, got {got}: pass a function such "
      "as losses.kl_divergence"
    )
  parameters = list(inspect.signature(loss).parameters)
  first = parameters[0] if parameters else None
  is_optax = (getattr(loss, "__module__", None) or "").startswith("optax")
  if is_optax and (first == "log_predictions" or "labels" in parameters[:2]):
    raise ValueError(
      f"loss: expected a function of the outputs of both networks, got optax's {name_of(loss)}, "
      f"which takes {parameters[:2]}: use a loss of distill_jax.losses such as losses.kl_divergence"
    )
  if first in ("y_true", "teacher", "target", "targets"):
    raise ValueError(
      f"loss: expected a function (student, teacher) -> values, got {name_of(loss)}, whose first "
      f"argument is {first!r}: swap them, `lambda student, teacher: loss(teacher, student)`"
    )


def check_free(loss: Callable, hyperparameters: Mapping[str, Any], filled: frozenset[str]) -> None:
  """Checks that a person passes no argument that the term fills.

  Raises:
    ValueError: one is passed; an array would take the place of each batch's.
  """
  sides = frozenset(list(inspect.signature(loss).parameters)[:2])
  for name in hyperparameters:
    if name in filled or name in sides:
      source = "the networks' outputs" if name in sides else "the batch"
      raise ValueError(
        f"{name}: expected none, because {name} of {name_of(loss)} comes from {source}, got one: "
        "leave it out"
      )


def mask_error(loss: Callable, values: tuple[int, ...], mask: tuple[int, ...]) -> ValueError:
  """Returns the error for values of fewer axes than the mask of a `valid` entry."""
  return ValueError(
    f"valid: expected a mask of the values {values} of {name_of(loss)}, or of their first axes, "
    f"got {mask}: mask rows {values[:1]}, or use a loss with a value for each position, such as "
    "losses.cosine"
  )


def check_values(loss: Callable, values: Any, rows: int) -> None:
  """Checks that a loss returned one or several real numbers a row, or a scalar.

  Raises:
    ValueError: it returned something else.
  """
  shape = getattr(values, "shape", None)
  dtype: Any = getattr(values, "dtype", None)
  if shape is not None and jnp.issubdtype(dtype, jnp.floating) and shape[:1] in ((), (rows,)):
    return
  got = type(values).__name__ if shape is None else f"{dtype} {tuple(shape)}"
  raise ValueError(
    f"loss: expected {name_of(loss)} to return float values of {rows} rows, or a scalar that "
    f"relates them, got {got}: return an array [rows]"
  )


def check_rows(call: Callable[[Any], Any], loss: Callable, arrays: Any, shape: tuple) -> None:
  """Checks that the first axis of a loss's values is the rows, where another axis has their number.

  A sum over the batch [C] looks like one value a row [B] where B equals C. The shapes of one row
  more tell them apart.

  Args:
    call: the loss of `arrays`.
    loss: for the message.
    arrays: what it takes, rows first.
    shape: of the values that it returned.

  Raises:
    ValueError: the values do not follow the number of rows.
  """
  shapes = [jnp.shape(x) for x in jax.tree.leaves(arrays)]
  rows = shapes[0][0]
  if not shape or rows == 1 or all(rows not in x[1:] for x in shapes):
    return
  try:
    longer = jax.eval_shape(
      lambda: call(jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), arrays))
    )
  except (TypeError, ValueError):  # It takes this number of rows only.
    return
  if longer.shape[0] == rows:
    raise ValueError(
      f"loss: expected {name_of(loss)} to return one value a row, got {tuple(shape)} of {rows} "
      f"rows and {tuple(longer.shape)} of {rows + 1}: reduce the other axes, not axis 0"
    )


def _hint(name: str, names: list[str]) -> str:
  """Returns what to write instead of a name."""
  if name in names:
    return f": write losses.{name}"
  return suggest(name, names)


def check_names(loss: Callable, step_arguments: frozenset[str], passed: set[str]) -> None:
  """Checks that a loss has the arguments that are passed by name, and requires no other.

  Args:
    loss: a function.
    step_arguments: those that the step passes.
    passed: those that a person passes.

  Raises:
    ValueError: it has no argument of a name, or requires one that is missing.
  """
  signature = inspect.signature(loss)
  try:
    signature.bind(None, None, **dict.fromkeys(step_arguments | passed))
  except TypeError as error:
    unknown = sorted(passed - set(signature.parameters))
    if not unknown:
      raise ValueError(
        f"loss: expected the arguments of {name_of(loss)}, got too few ({error}): pass it by "
        "name; a loss with learned parts or a memory has a term of its own in objectives"
      ) from error
    options = set(list(signature.parameters)[2:]) - step_arguments
    raise ValueError(
      f"{unknown[0]}: expected a hyper-parameter of {name_of(loss)}, got {unknown[0]!r}"
      f"{suggest(unknown[0], options)}"
    ) from error


def check_options(loss: Callable, passed: set[str], options: Mapping[str, Any]) -> frozenset[str]:
  """Checks the hyper-parameters of a term's own loss by name and type; returns the names of
  schedules.

  Args:
    loss: a function.
    passed: the arguments that the term passes by name.
    options: those that a person passes, numbers or schedules.

  Raises:
    ValueError: as `check_names` and `check_types`.
  """
  check_names(loss, frozenset(passed), set(options))
  return check_types(loss, options)


def name_of(loss: Any) -> str:
  """Returns the name of a loss for messages."""
  return getattr(loss, "__name__", type(loss).__name__)
