"""Checks each batch that is trained on while it is on the host: compiled code cannot raise."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distill_jax import data
from distill_jax.data.label_checks import IgnoreLabel, mark_entries
from distill_jax.train.batch_errors import name_field
from distill_jax.types import Batch


class Checks(NamedTuple):
  """What is checked and marked on the host in each batch that is trained on.

  Attributes:
    classes: entries with labels of classes, as in `data.check_batch`.
    ignore_label: of them, as in `data.check_batch`.
    weights: entries with weights of examples.
    marks: `{entry with numbers to predict: value that marks what has no label}`, which its term
      does not know.
  """

  classes: Mapping[str, int | None]
  ignore_label: IgnoreLabel = None
  weights: frozenset[str] = frozenset()
  marks: Mapping[str, int] = {}


def checked_batch(batch: Mapping[str, Any], checks: Checks) -> dict[str, Any]:
  """Returns the batch with `UNLABELED` in place of the ignore labels, after its checks.

  Raises:
    ValueError: as in `data.check_batch` and `check_entries`.
  """
  data.check_batch(batch, checks.classes, checks.ignore_label)
  batch = {**batch, **mark_entries(batch, checks.classes, checks.ignore_label)}
  check_entries(batch, checks)
  return batch


def check_entries(arrays: Mapping[str, Any], checks: Checks) -> None:
  """Checks weights of examples, and numbers to predict, of marked labels.

  Raises:
    ValueError: a weight is negative, or a number marks what has no label.
  """
  where = arrays.get("where")
  for name in sorted(checks.weights & set(arrays)):
    weights = arrays[name] if where is None else arrays[name][where]
    if (weights < 0).any():
      raise ValueError(
        f"{name}: expected weights >= 0, got {weights.min():g}: a weight of 0 leaves an example out"
      )
  for name, mark in checks.marks.items():
    if name in arrays and (arrays[name] == mark).any():
      raise ValueError(
        f"{name}: expected numbers to predict, got {mark}, which marks what has no label: write "
        f"labels(loss, ignore_label={mark})"
      )


def check_example(source: Any, example: Batch, checks: Checks) -> Batch:
  """Returns the first batch that is trained on, marked as all others are, and checked unless
  `batches_of` checks the whole source.
  """
  if isinstance(source, data.Source):
    return {**example, **mark_entries(example, checks.classes, checks.ignore_label)}
  with name_field("source"), name_field("batch 0, counted from 0"):
    return checked_batch(example, checks)
