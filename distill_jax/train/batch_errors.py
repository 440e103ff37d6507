"""Lets errors say which argument, batch and entry they are about."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.types import Batch


@contextlib.contextmanager
def name_field(field: str) -> Iterator[None]:
  """Puts a field in front of a ValueError raised inside, in place of 'source'; subclasses stay."""
  try:
    yield
  except ValueError as error:
    if type(error) is not ValueError:
      raise
    raise ValueError(f"{field}: {str(error).removeprefix('source: ')}") from error


@contextlib.contextmanager
def name_shapes(field: str, batch: Batch, first: Batch) -> Iterator[None]:
  """Lets an error of a network name the entry of a batch whose shape is not the first batch's.

  Such entries are not rejected as such: a convolutional network takes images of many sizes.
  """
  try:
    yield
  # Each library raises types of its own.
  except Exception as error:
    change = data.shape_change(batch, first)
    if not change:
      raise
    reason = str(error).strip().splitlines()[0]
    raise ValueError(
      f"{field}: {change}, which the networks do not take ({reason}): make the batches alike"
    ) from error


def map_batches(
  function: Callable[[Batch], Any], batches: Iterable[Batch], field: str
) -> Iterator[Any]:
  """Yields `function(batch)` for each batch, with the errors of `name_shapes`."""
  first = None
  for number, batch in enumerate(batches):
    first = first or {name: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for name, x in batch.items()}
    with name_shapes(f"{field}: batch {number}, counted from 0", batch, first):
      result = function(batch)
    yield result
