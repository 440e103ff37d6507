"""Finds the arguments by which a network is told whether it trains."""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

_TRAINING_FLAGS = {"train", "training", "is_training"}
_INFERENCE_FLAGS = {"deterministic", "use_running_average"}
FLAGS = _TRAINING_FLAGS | _INFERENCE_FLAGS


def mode_arguments(function: Callable[..., Any]) -> set[str]:
  """Returns the names of a function's arguments that set the mode."""
  return set(signature(function).parameters) & FLAGS


def mode(flags: Iterable[str], train: bool) -> dict[str, bool]:
  """Returns the value of each of these arguments."""
  return {flag: train if flag in _TRAINING_FLAGS else not train for flag in flags}
