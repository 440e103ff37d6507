"""Notices validation examples that are trained on."""

import warnings
from typing import Any

import numpy as np

from distill_jax.data.pipeline import Pipeline
from distill_jax.data.source import Source

CHUNK = 1_000


def check_no_shared_iterator(train: Any, evaluation: Any) -> None:
  """Checks that training and evaluation do not read one iterator.

  Raises:
    ValueError: both are pipelines of it.
  """
  pipelines = isinstance(train, Pipeline) and isinstance(evaluation, Pipeline)
  if pipelines and evaluation.shares_iterator(train):
    raise ValueError(
      f"evaluation: expected batches of its own, got {evaluation.name}, which reads the iterator "
      "of source: write a function that makes a new iterator in each call, or pass a list"
    )


def warn_of_shared_examples(train: Source, evaluation: Source) -> None:
  """Warns if examples of an evaluation, the same ids with equal arrays, are trained on."""
  count = len(evaluation) if train is evaluation else _count_shared(train, evaluation)
  if count:
    warnings.warn(
      f"evaluation: expected examples that are not trained on, got {count} of {len(evaluation)} "
      "that are: hold some out, train, validation = data.split(source, 0.1)",
      stacklevel=2,
    )


def _count_shared(train: Source, evaluation: Source) -> int:
  names = sorted(train.arrays.keys() & evaluation.arrays.keys() - {"id"})
  shapes_match = all(train.arrays[n].shape[1:] == evaluation.arrays[n].shape[1:] for n in names)
  if not names or not shapes_match:
    return 0
  _, rows, others = np.intersect1d(train.ids, evaluation.ids, return_indices=True)
  # In chunks, since a copy of all rows may not fit into memory.
  return sum(
    _count_equal(train, evaluation, names, rows[i : i + CHUNK], others[i : i + CHUNK])
    for i in range(0, len(rows), CHUNK)
  )


def _count_equal(train: Source, evaluation: Source, names, rows, others) -> int:
  is_equal = np.ones(len(rows), bool)
  for name in names:
    pairs = train.arrays[name][rows] == evaluation.arrays[name][others]
    is_equal &= pairs.reshape(len(rows), -1).all(axis=1)
  return int(is_equal.sum())
