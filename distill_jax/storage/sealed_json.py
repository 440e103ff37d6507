"""Writes JSON with a checksum, and reads it: what was edited or damaged is detected.

A file is one object, or lines of objects (JSONL). Each object has its checksum as its last entry,
and a line its number before that.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax.errors import check_integer, join_first
from distill_jax.storage import files, unique_names

_CHECKSUM = "checksum"
_NUMBER = "line_number"
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


def dump_lines(lines: Iterable[Mapping[str, Any]], first: int = 1) -> str:
  """Returns lines of JSON text, which `read_lines` reads.

  Args:
    lines: what json can hold.
    first: number of the first one in its file, which begins with 1.
  """
  numbered = ({**line, _NUMBER: number} for number, line in enumerate(lines, first))
  return "".join(dumps(line) + "\n" for line in numbered)


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Returns the values of each line of a file, in the order in which they were written.

  Corrupt lines are left out. A warning names them, missing ones, and doubled or moved ones. A last
  line without an end is left out without a word: a killed process leaves it. That the last lines of
  all were removed goes unnoticed.

  Raises:
    FileNotFoundError: there is no such file.
  """
  lines = files.read(path).split(b"\n")
  values: dict[int, dict[str, Any]] = {}
  order: list[int] = []
  corrupt: dict[int, str] = {}
  for position, line in enumerate(lines, 1):
    try:
      line_values = loads(line)
      number = check_integer(_NUMBER, line_values.pop(_NUMBER, None), 1)
      values[number] = line_values
      order.append(number)
    except ValueError as error:
      if position < len(lines):
        corrupt[position] = str(error)
        order.append(order[-1] + 1 if order else 1)
  _warn_of_faults(path, order, corrupt)
  return [values[number] for number in sorted(values)]


def _warn_of_faults(path: Path, order: Sequence[int], corrupt: Mapping[int, str]) -> None:
  """Warns of lines that are corrupt, by position, and of numbers that are not 1, 2, 3, ..."""
  missing = sorted(set(range(1, max(order, default=0))) - set(order))
  faults = []
  if corrupt:
    reason = next(iter(corrupt.values()))
    faults.append(f"skipping line {join_first(corrupt)} of {path}, which is corrupt: {reason}")
  if missing:
    faults.append(f"line {join_first(missing)} of {path} is missing: it was removed")
  elif list(order) != list(range(1, len(order) + 1)):
    faults.append(f"{path} has doubled or moved lines, which are read once and in order")
  for fault in faults:
    warnings.warn(fault, RuntimeWarning, stacklevel=3)


def _digest(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
