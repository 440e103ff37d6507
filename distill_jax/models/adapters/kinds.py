"""Tells which adapter takes a network, without an import of its library."""

import inspect
from collections.abc import Callable
from typing import Any

from distill_jax.types import Model

# In this order: a Haiku transform is a tuple of functions, a Keras model is a callable.
_ADAPTERS = {
  "flax.nnx": "from_nnx",
  "flax.linen": "from_linen",
  "keras": "from_keras",
  "equinox": "from_equinox",
  "haiku": "from_haiku",
}


def adapter_of(network: Any) -> str | None:
  """Returns the name of the adapter for an object or a class; None: its library is unknown."""
  kind = network if isinstance(network, type) else type(network)
  for base in kind.__mro__:
    for package, adapter in _ADAPTERS.items():
      if base.__module__ == package or base.__module__.startswith(package + "."):
        return adapter
  return None


def check_model(field: str, network: Any) -> None:
  """Checks that a network was made a Model.

  Raises:
    ValueError: it was not; the message names its adapter.
  """
  if not isinstance(network, Model):
    adapter = adapter_of(network) or "from_nnx, from_linen, from_keras or from_apply"
    raise ValueError(
      f"{field}: expected a Model, got {type(network).__name__}: make one with models.{adapter}"
    )


def check_call(field: str, function: Callable[..., Any], count: int, expected: str) -> None:
  """Checks that a function can be called with `count` arguments.

  Args:
    field: name of the argument, for the message.
    function: builds a network.
    count: number of positional arguments.
    expected: what the adapter takes.

  Raises:
    ValueError: it cannot.
  """
  try:
    signature = inspect.signature(function)
  except ValueError:
    return  # Of a builtin nothing is known.
  try:
    signature.bind(*[None] * count)
  except TypeError as error:
    raise ValueError(
      f"{field}: expected {expected}, got a function of {signature}: {error}: write a function of "
      f"{count} arguments"
    ) from None


def wrong_kind(field: str, expected: str, network: Any) -> ValueError:
  """Returns the error for a network that the called adapter does not take.

  Args:
    field: name of the argument.
    expected: what the adapter takes.
    network: what came; the message names its adapter.
  """
  adapter = adapter_of(network)
  if isinstance(network, type):
    kind, hint = f"the class {network.__name__}", ": pass an instance"
  elif adapter is None:
    kind, hint = f"{type(network).__name__} {network!r:.80}", ""
    if callable(network):
      hint = ": from_apply takes a function of (params, *inputs)"
  else:
    kind, hint = type(network).__name__, f": {adapter} takes the models of this library"
  return ValueError(f"{field}: expected {expected}, got {kind}{hint}")
