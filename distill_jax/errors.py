"""Checks integers; suggests names and packages, and shortens lists, in error messages."""

import contextlib
import difflib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_EXTRAS = {
  "faster_coco_eval": "detection",
  "jiwer": "speech",
  "keras": "keras",
  "libtpu": "tpu",
  "onnxruntime": "onnx",
  "pyarrow": "parquet",
  "qwix": "quantize",
  "rapidfuzz": "translation",
  "sacrebleu": "translation",
  "seqeval": "tagging",
  "soundfile": "audio",
  "soxr": "audio",
}


def check_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
  """Returns an integer of Python.

  Raises:
    ValueError: the value is no integer (a bool is none), or outside of the limits.
  """
  limits = "" if least is None else f" >= {least}" if most is None else f" from {least} to {most}"
  try:
    if isinstance(value, bool):
      raise TypeError
    integer = operator.index(value)
  except TypeError:
    got = "a function, and it cannot change while training" if callable(value) else repr(value)
    whole = isinstance(value, float) and value.is_integer()
    hint = f": write {int(value)}" if whole else ""
    raise ValueError(f"{name}: expected an integer{limits}, got {got}{hint}") from None
  if (least is not None and integer < least) or (most is not None and integer > most):
    raise ValueError(f"{name}: expected an integer{limits}, got {value!r}")
  return integer


def suggest(name: str, candidates: Iterable[object]) -> str:
  """Returns the end of a message about an unknown name: the nearest candidates, or all of them.

  >>> suggest("lable", ["label", "image"])
  "; did you mean 'label'?"
  """
  names = sorted(map(str, candidates))
  nearest = nearest_names(name, names)
  if nearest:
    return f"; did you mean {' or '.join(map(repr, nearest))}?"
  return f"; there are {names}"


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
  """Returns the name that is spelled most alike, or those that contain it; maybe none."""
  nearest = difflib.get_close_matches(name, names, n=1)
  return nearest or [candidate for candidate in names if name and name in candidate]


def join_first(items: Iterable[object], separator: str = ", ", most: int = 5) -> str:
  """Returns the first items, and how many more there are.

  >>> join_first([3, 4, 5], most=2)
  '3, 4, and 1 more'
  """
  texts = list(map(str, items))
  more = [f"and {len(texts) - most} more"] if len(texts) > most else []
  return separator.join(texts[:most] + more)


def install_hint(package: str) -> str:
  """Returns the end of a message about a package that is not installed: the extra that has it.

  >>> install_hint("qwix")
  "install distill-jax with its extra 'quantize', in a checkout: pip install '.[quantize]'"
  """
  extra = _EXTRAS.get(package, "train")
  return f"install distill-jax with its extra {extra!r}, in a checkout: pip install '.[{extra}]'"


@contextlib.contextmanager
def naming_extras() -> Iterator[None]:
  """Lets failed imports say which extra has the package.

  Raises:
    ModuleNotFoundError: a package is not installed.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or "distill_jax").split(".")[0]
    if package == "distill_jax" or isinstance(error.__cause__, ModuleNotFoundError):
      raise
    message = f"{package}: expected an installed package, got none: {install_hint(package)}"
    raise ModuleNotFoundError(message, name=error.name) from error


@contextlib.contextmanager
def naming_missing(expected: str, names: Iterable[str]) -> Iterator[None]:
  """Lets a function of the user's say which name is missing that it looks up.

  Args:
    expected: what the name should be, such as "an output of the student".
    names: those that there are.

  Raises:
    ValueError: in place of the KeyError of a name that is not there.
  """
  candidates = set(names)
  try:
    yield
  except KeyError as error:
    name = error.args[0] if error.args else None
    if not isinstance(name, str) or name in candidates:
      raise
    raise ValueError(f"{name}: expected {expected}, got none{suggest(name, candidates)}") from error
