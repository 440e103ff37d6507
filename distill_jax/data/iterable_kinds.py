"""Tells kinds of iterables apart by what they offer, without a dependency on their libraries."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any


def check_iterable(iterable: Any) -> None:
  """Checks that batches can be read from an object.

  Raises:
    ValueError: it is a path, a number, or a set of single examples.
  """
  if _is_set_of_examples(iterable):
    raise ValueError(
      f"source: expected batches, got single examples of {type(iterable).__name__}: batch them, "
      "e.g. with torch's DataLoader(dataset, batch_size=64)"
    )
  is_path = isinstance(iterable, str | bytes)
  if is_path or not (callable(iterable) or hasattr(iterable, "__iter__")):
    raise ValueError(
      f"source: expected a data.Source, a dict of arrays or batches that can be iterated, got "
      f"{type(iterable).__name__}: pass what data.from_iterable takes"
    )


def takes_start(function: Callable) -> bool:
  """Returns whether a function is one of the first step, not of nothing."""
  try:
    parameters = inspect.signature(function).parameters.values()
  except ValueError:
    return True
  positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  return any(p.default is p.empty or p.name == "start" for p in positional)


def has_state(iterator: Any) -> bool:
  """Returns whether an iterator can tell its position, and continue there, as those of grain."""
  is_iterator = isinstance(iterator, Iterator)
  return is_iterator and hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def iterators_of(iterable: Any) -> list[Iterator]:
  """Returns the iterator that an iterable is, or those that its function reads by name."""
  if isinstance(iterable, Iterator):
    return [iterable]
  if not inspect.isfunction(iterable):
    return []
  try:
    variables = inspect.getclosurevars(iterable)
  except ValueError:  # A variable of an outer function has no value yet.
    return []
  values = [*variables.nonlocals.values(), *variables.globals.values()]
  endless = (itertools.count, itertools.cycle, itertools.repeat)  # Counters may be shared.
  return [x for x in values if isinstance(x, Iterator) and not isinstance(x, endless)]


def is_array(values: Any) -> bool:
  """Returns whether values are an array of any library."""
  return hasattr(values, "shape") and hasattr(values, "dtype")


def is_endless(iterable: Any) -> bool:
  """Returns whether an iterable is known to repeat without an end; most do not tell."""
  if isinstance(iterable, itertools.cycle):
    return True
  if hasattr(iterable, "cardinality"):
    return int(iterable.cardinality()) == -1  # TensorFlow's INFINITE_CARDINALITY.
  try:
    return len(iterable) == sys.maxsize  # Grain's repeat().
  except (TypeError, NotImplementedError):
    return False


def _is_set_of_examples(iterable: Any) -> bool:
  """Returns whether an object only gives examples by their number, as data sets of torch do."""
  is_indexed = hasattr(iterable, "__getitem__") and hasattr(iterable, "__len__")
  return is_indexed and not hasattr(iterable, "__iter__") and not callable(iterable)
