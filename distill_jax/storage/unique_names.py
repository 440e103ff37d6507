"""Rejects JSON and safetensors files with two entries of one name: readers take the last one."""

import json
from pathlib import Path
from typing import Any


def loads(content: str | bytes) -> Any:
  """Returns the values of JSON text.

  Raises:
    ValueError: it is no JSON, has too many levels, or an object has two entries of one name.

  >>> loads('{"a": 1}')
  {'a': 1}
  """
  try:
    return json.loads(content, object_pairs_hook=_unique)
  except RecursionError as error:
    raise ValueError("expected JSON of few levels, got too many") from error


def check_names(path: Path) -> None:
  """Checks that a safetensors file has each name once; other faults are left to its reader.

  Raises:
    ValueError: it has two arrays of one name.
  """
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    if size <= path.stat().st_size:
      loads(file.read(size))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    doubled = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"expected names that differ, got two entries {doubled!r}")
  return values
