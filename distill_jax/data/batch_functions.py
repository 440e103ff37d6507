"""Checks the functions of batches that training and caches take: `augment` and `mix`."""

import inspect
from typing import Any

AUGMENT_EXAMPLE = "data.augmentation(data.flip(), seed=0)"


def check_augment(augment: Any) -> None:
  """Checks that `augment` is None or a function of one batch.

  Raises:
    ValueError: it is a transform, several of them, or a mixer.
  """
  if augment is None or takes_arguments(augment, 1):
    return
  raise ValueError(
    f"augment: expected a function of one batch, such as {AUGMENT_EXAMPLE}, got "
    f"{describe_function(augment)}: wrap transforms such as data.flip() in data.augmentation, and "
    "pass data.mixup and data.cutmix as mix"
  )


def check_mix(mix: Any) -> None:
  """Checks that `mix` is None or a function of a key and a batch.

  Raises:
    ValueError: it is an augmentation, a transform, or no function.
  """
  if mix is None or (takes_arguments(mix, 2) and "kind" not in _parameters(mix)):
    return
  raise ValueError(
    f"mix: expected a function of (key, batch), such as data.mixup(0.2, classes=10), got "
    f"{describe_function(mix)}: pass {AUGMENT_EXAMPLE} as augment"
  )


def takes_arguments(function: Any, count: int) -> bool:
  """Returns whether a function can be called with this number of arguments, as far as it tells."""
  if not callable(function):
    return False
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return True  # A builtin without a signature.
  try:
    signature.bind(*range(count))
  except TypeError:
    return False
  return True


def _parameters(function: Any) -> list[str]:
  try:
    return list(inspect.signature(function).parameters)
  except (TypeError, ValueError):
    return []


def describe_function(function: Any) -> str:
  if not callable(function):
    return f"a {type(function).__name__}"
  return f"one of ({', '.join(_parameters(function))})"
