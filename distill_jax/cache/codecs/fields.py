"""Checks the fields that codecs share."""

import math
import operator
from typing import Any

import numpy as np

Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""A codec's columns: name -> (dtype, shape of one row)."""


def check_k(k: Any) -> int:
  """Returns k as an integer of at least 1, or raises ValueError."""
  return check_integer("k", k, 1, 2**31 - 1)


def check_temperature(temperature: Any) -> float:
  """Returns the temperature as a finite float > 0, or raises ValueError."""
  value = float(temperature)
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
  return value


def check_integer(name: str, value: Any, low: int, high: int) -> int:
  """Returns the value as an integer from `low` to `high`, or raises ValueError."""
  try:
    number = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}: expected an integer, got {value!r}") from None
  if not low <= number <= high:
    nearest = min(max(number, low), high)
    raise ValueError(
      f"{name}: expected an integer from {low} to {high}, got {number}; nearest is {nearest}"
    )
  return number
