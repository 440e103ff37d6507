"""Names functions together with the values that they close over."""

import inspect
from typing import Any


def function_name(function: Any) -> str:
  """Returns a name such as `augmentation(seed=0, transforms=(shift_crop(padding=2), flip()))`.

  Tuples and lists of functions, and plain values, are named as well.
  """
  if isinstance(function, tuple | list):
    return f"({', '.join(map(function_name, function))})"
  if not callable(function):
    is_plain = function is None or isinstance(function, bool | int | float | str)
    # Another repr may hold an address.
    return repr(function) if is_plain else type(function).__qualname__
  qualified = getattr(function, "__qualname__", type(function).__qualname__)
  name = qualified.partition(".<locals>")[0]
  if not inspect.isfunction(function):
    return name
  variables = _closure(function)
  values = [f"{key}={function_name(variables[key])}" for key in sorted(variables)]
  return f"{name}({', '.join(values)})"


def _closure(function: Any) -> dict[str, Any]:
  """Returns the variables of a closure; a sibling function stands for those of its own closure."""
  scope = function.__qualname__.rpartition(".")[0]
  variables: dict[str, Any] = {}
  for name, value in inspect.getclosurevars(function).nonlocals.items():
    is_sibling = (
      inspect.isfunction(value)
      and value.__qualname__.rpartition(".")[0] == scope
      and value is not function
    )
    variables.update(_closure(value) if is_sibling and scope else {name: value})
  return variables
