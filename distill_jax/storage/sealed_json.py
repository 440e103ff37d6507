"""Writes JSON with a checksum, and reads it: what was edited or damaged is detected.

A file is one object, or lines of objects (JSONL). Each object has its checksum as its last entry.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import join_first
from distill_jax.storage import files, unique_names

_CHECKSUM = "checksum"
_KEY = f'"{_CHECKSUM}": "'


def dumps(values: Mapping[str, Any], *, indent: int | None = None) -> str:
  """Returns an object as JSON text, its checksum added.

  Args:
    values: what json can hold.
    indent: spaces of each level; None: one line.

  Raises:
    TypeError, ValueError: json cannot hold them.

  >>> dumps({"step": 3})
  '{"step": 3, "checksum": "40ecef339b527104"}'
  """
  text = json.dumps({**values, _CHECKSUM: ""}, indent=indent)
  start, key, end = text.rpartition(_KEY)
  return f"{start}{key}{_digest(start)}{end}"


def loads(content: str | bytes) -> dict[str, Any]:
  """Returns the values that `dumps` got.

  Raises:
    ValueError: the text was changed, or is not from `dumps`.
  """
  text = content if isinstance(content, str) else content.decode()
  start, _, end = text.rpartition(_KEY)
  values = unique_names.loads(text)
  if not isinstance(values, dict):
    raise ValueError(f"expected a JSON object, got a {type(values).__name__}")
  if _CHECKSUM not in values:
    raise ValueError(f"expected the entry {_CHECKSUM!r}, got {list(values)[:5]}")
  # Texts are compared, not values: JSON reads some texts alike (1e5 and 1E5).
  if values.pop(_CHECKSUM) != _digest(start) or not end.startswith(_digest(start)):
    raise ValueError(f"{_CHECKSUM}: the text is not the one that was written")
  return values


def read(path: Path, *names: str) -> dict[str, Any]:
  """Returns the values of a file that holds one object with entries of these names.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it was changed, is not from `dumps` or lacks an entry; the message names it.
  """
  try:
    values = loads(files.read(path))
    missing = [name for name in names if name not in values]
    if missing:
      raise ValueError(f"expected the entry {missing[0]!r}, got {list(values)[:5]}")
    return values
  except ValueError as error:
    raise ValueError(f"{path} is corrupt: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Returns the values of each line of a file; warns of corrupt lines, which are left out.

  A last line without an end is left out without a word: a killed process leaves it.

  Raises:
    FileNotFoundError: there is no such file.
  """
  lines = files.read(path).split(b"\n")
  values, corrupt = [], {}
  for number, line in enumerate(lines, 1):
    try:
      values.append(loads(line))
    except ValueError as error:
      if number < len(lines):
        corrupt[number] = str(error)
  if corrupt:
    reason = next(iter(corrupt.values()))
    warnings.warn(
      f"skipping line {join_first(corrupt)} of {path}, which is corrupt: {reason}",
      RuntimeWarning,
      stacklevel=2,
    )
  return values


def _digest(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
