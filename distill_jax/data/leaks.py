"""Notices validation examples that are trained on."""

import warnings
from typing import Any

import numpy as np

from distill_jax.data.groups import shared_groups
from distill_jax.data.pipeline import Pipeline
from distill_jax.data.source import Source
from distill_jax.data.videos import Videos

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


def check_no_shared_groups(train: Any, evaluation: Any, field: str = "evaluation") -> None:
  """Checks that no group of examples, as the `groups` of a source say, is on both sides.

  Args:
    train: a `Source`, `Videos`, a stream of them, or anything else, which has no groups.
    evaluation: as `train`.
    field: what an error names.

  Raises:
    ValueError: a group is, or rectangles touch.
  """
  train = _with_groups(train)
  evaluation = _with_groups(evaluation)
  if not isinstance(train, Source) or not isinstance(evaluation, Source):
    return
  name, count = shared_groups(train, evaluation)
  if not count:
    return
  is_map = train.arrays[name].ndim == 2
  relation = "touch a rectangle" if is_map else "are of a group"
  function = "split_regions(source, 0.1, region=256)" if is_map else "split(source, 0.1)"
  raise ValueError(
    f"{field}: expected no {name!r} on both sides, got {count} of {len(evaluation)} examples that "
    f"{relation} of the other side: write rest, {field} = data.{function}"
  )


def check_no_shared_cases(
  train: Any, evaluation: Any, entry: str, field: str = "evaluation"
) -> None:
  """Checks that no case, as a task numbers them, is on both sides.

  Sources of one set have one numbering. Others may number their own cases from 0: they warn.

  Args:
    train, evaluation: as of `check_no_shared_groups`.
    entry: the entry with the numbers, integers [N], of both sources; "": there is none.
    field: what an error names.

  Raises:
    ValueError: parts of one set share a case.
  """
  train = _with_groups(train)
  evaluation = _with_groups(evaluation)
  if not isinstance(train, Source) or not isinstance(evaluation, Source):
    return
  if entry not in train.arrays or entry not in evaluation.arrays or train is evaluation:
    return
  shared = np.intersect1d(train.arrays[entry], evaluation.arrays[entry])
  if not shared.size:
    return
  message = (
    f"{field}: expected no {entry!r} on both sides, got {shared.size} there, {shared[0]} the first:"
  )
  is_one_set = train.name == evaluation.name and not np.isin(evaluation.ids, train.ids).any()
  if is_one_set:
    raise ValueError(f"{message} write rest, {field} = data.split(source, 0.1, groups={entry!r})")
  if not _count_shared(train, evaluation):
    warnings.warn(f"{message} give other cases other numbers in one of the sets", stacklevel=2)


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


def _with_groups(examples: Any) -> Any:
  """Returns the `Source` of `Videos` or of a stream of them; anything else as it is."""
  videos = getattr(examples, "images", examples)  # Of a `stream.Stream`.
  return videos.examples if isinstance(videos, Videos) else examples
