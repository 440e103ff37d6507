"""Finds the arguments by which a network is told whether it trains."""

import re
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

_TRAINING_FLAGS = {"train", "training", "is_training"}
_INFERENCE_FLAGS = {"deterministic", "use_running_average"}
FLAGS = _TRAINING_FLAGS | _INFERENCE_FLAGS

_MODE_NAME = re.compile(r"train|eval|infer|determinis|(^|_)test")


def mode_arguments(function: Callable[..., Any]) -> set[str]:
  """Returns the names of a function's arguments that set the mode.

  Raises:
    ValueError: there is none but one whose name sounds like it; left at its default, the network
      would be in one mode in training and in evaluation.
  """
  parameters = signature(function).parameters
  flags = set(parameters) & FLAGS
  if flags:
    return flags
  for name, parameter in parameters.items():
    if isinstance(parameter.default, bool) and _MODE_NAME.search(name):
      raise ValueError(
        f"module: expected one of the arguments {sorted(FLAGS)}, which set the mode, got {name!r}: "
        f"rename it, or set it in call=, such as call=lambda net, x, train: net(x, {name}=train)"
      )
  return flags


def mode(flags: Iterable[str], train: bool) -> dict[str, bool]:
  """Returns the value of each of these arguments."""
  return {flag: train if flag in _TRAINING_FLAGS else not train for flag in flags}
