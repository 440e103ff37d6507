"""Checks the counts that `write_cache` and `verify` take."""

import operator
from typing import Any


def check_count(name: str, value: Any) -> int:
  """Returns the value as an integer of at least 1, or raises ValueError."""
  try:
    number = operator.index(value)
  except TypeError:
    number = 0
  if number < 1:
    raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
  return number


def check_part(part: tuple[int, int] | None) -> None:
  """Raises ValueError unless the part is None or an (index, count) with 0 <= index < count."""
  if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1]):
    raise ValueError(f"part: expected (index, count) with 0 <= index < count, got {part}")
