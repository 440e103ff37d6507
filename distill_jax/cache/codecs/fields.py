"""Checks the fields that codecs share."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.errors import check_integer

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


def check_size(size: Any) -> tuple[int, ...]:
  """Returns the grid of a map as integers of at least 1, or raises ValueError."""
  if not isinstance(size, Sequence) or isinstance(size, str) or not size:
    raise ValueError(f"size: expected a grid such as (64, 64), got {size!r}")
  return tuple(check_integer("size", n, 1) for n in size)
