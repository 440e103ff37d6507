"""Compares what the processes of one run were given: a hash first, then the first difference."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_EXCERPT = 100
_CONTEXT = 20


def assert_equal(name: str, value: Any) -> None:
  """Checks that all processes pass the same value; all must call it.

  Args:
    name: name of the value, for the error.
    value: any value that json can hold.

  Raises:
    ValueError: the values differ: the same sentence on all processes, with the field and the
      processes.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(value, sort_keys=True).encode()
  digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
  digests = multihost_utils.process_allgather(digest)
  if (digests != digests[0]).any():
    raise ValueError(inequality(name, [json.loads(each) for each in _gather(text)]))


def inequality(name: str, values: Sequence[Any]) -> str:
  """Returns the sentence on the first difference of the processes' JSON values, which differ.

  >>> inequality("run", [{"seed": 0}, {"seed": 1}, {"seed": 1}])[:79]
  'run.seed: expected the same on all processes, got 0 on process 0 and 1 on proce'
  """
  differences = {
    process: first_difference(values[0], value)
    for process, value in enumerate(values)
    if value != values[0]
  }
  difference = next(iter(differences.values()))
  processes = [str(process) for process, other in differences.items() if other == difference]
  path, first, other = difference
  first_text, other_text = _excerpts(json.dumps(first), json.dumps(other))
  plural = "es" if len(processes) > 1 else ""
  return (
    f"{'.'.join((name, *path))}: expected the same on all processes, got {first_text} on process 0 "
    f"and {other_text} on process{plural} {', '.join(processes)}: give all of them the same "
    "command, files and data"
  )


def first_difference(a: Any, b: Any) -> tuple[tuple[str, ...], Any, Any]:
  """Returns the path of the first difference of two JSON values, and the two values there.

  >>> first_difference({"x": [1, 2]}, {"x": [1, 3]})
  (('x', '1'), 2, 3)
  """
  if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
    a, b = dict(enumerate(a)), dict(enumerate(b))
  if not isinstance(a, dict) or not isinstance(b, dict):
    return (), a, b
  missing = object()
  for key in a | b:
    left, right = a.get(key, missing), b.get(key, missing)
    if left is missing or right is missing:
      left, right = ("nothing" if value is missing else value for value in (left, right))
      return (str(key),), left, right
    if left != right:
      path, left, right = first_difference(left, right)
      return (str(key), *path), left, right
  return (), a, b


def _gather(text: bytes) -> list[bytes]:
  """Returns the texts of all processes; json has no zeros, with which they are padded."""
  length = multihost_utils.process_allgather(np.int32(len(text))).max()
  padded = np.frombuffer(text.ljust(length, b"\0"), np.uint8)
  return [bytes(row).rstrip(b"\0") for row in multihost_utils.process_allgather(padded)]


def _excerpts(a: str, b: str) -> tuple[str, str]:
  """Returns the texts; of long ones the part with their first difference."""
  pairs = enumerate(zip(a, b))
  same = next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))
  start = max(0, same - _CONTEXT) if max(len(a), len(b)) > _EXCERPT else 0
  return _excerpt(a, start), _excerpt(b, start)


def _excerpt(text: str, start: int) -> str:
  end = start + _EXCERPT
  return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
