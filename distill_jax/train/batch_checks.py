"""Checks each batch that is trained on while it is on the host: compiled code cannot raise."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import data
from distill_jax.data.label_checks import IgnoreLabel, mark_entries
from distill_jax.objectives.class_labels import BINARY, Entries
from distill_jax.train.batch_errors import name_field
from distill_jax.train.options import RunOptions
from distill_jax.types import Batch, Task


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


def with_ignore_label(run: RunOptions, task: Task | None, source: Any) -> RunOptions:
  """Returns the options with the ignore label of the task, which both may name, or that of batches
  of a `Source`, which has marked its labels.

  Raises:
    ValueError: the task and the options name different ones; `UNLABELED` of a task, which pads its
      labels, gives way.
  """
  label = None if task is None else task.ignore_label
  if label is None or (label == data.UNLABELED and run.ignore_label is not None):
    label = run.ignore_label
    if label is None and not isinstance(source, data.Source):
      label = getattr(source, "ignore_label", None)
  elif run.ignore_label not in (None, label):
    raise ValueError(
      f"ignore_label: expected the task's {label}, got {run.ignore_label} in RunOptions: give it "
      "once"
    )
  return dataclasses.replace(run, ignore_label=label)


def make_checks(
  classes: Mapping[str, int | None] | None,
  entries: Entries,
  *,
  source: Any,
  example: Batch,
  task: Task | None,
  ignore_label: int | None,
) -> Checks:
  """Returns the checks of labels and weights that the task or the objective's terms read.

  Args:
    classes: entries with labels of the task; None: no task, so that 'label' may hold anything.
    entries: those that the terms read.
    source, task, ignore_label: of the run.
    example: its first batch.

  Raises:
    ValueError: the task counts numbers that a term ignores, or all weights are 0.
  """
  known: dict[str, int | None] = {name: number for name, (number, _) in entries.classes.items()}
  if classes is not None:
    known |= classes
  elif "label" not in entries.numbers:
    known.setdefault("label", None)
  _check_ignored(task, entries, example)
  ignored = dict.fromkeys(known, ignore_label)
  # The run's mark is that of 'label'; transcripts are padded without one.
  others = entries.transcripts - ({"label"} if ignore_label is not None else set())
  ignored |= dict.fromkeys(others, data.UNLABELED)
  ignored |= {name: x for name, (_, x) in entries.classes.items() if x is not None}
  marks = {}
  for name, own in entries.numbers.items():
    is_marked = name in known or (name == "label" and getattr(source, "classes", None) is not None)
    mark = data.UNLABELED if is_marked else ignore_label
    if mark is not None and mark != own:
      marks[name] = mark
  examples = source.arrays if isinstance(source, data.Source) else example
  for name in sorted(entries.weights & set(examples)):
    _check_weights(name, np.asarray(examples[name]))
  return Checks(known, ignored, frozenset(entries.weights), marks)


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


def warn_of_unshifted_labels(
  example: Batch, checks: Checks, augment: Callable[[Batch], Batch] | None = None
) -> None:
  """Warns where labels [B, T] of a sequence's positions are an entry of the input, not its next
  tokens: the student would learn to copy.

  Args:
    example: the first batch, marked.
    checks: what is checked in it.
    augment: of the run; it may hide tokens, and leave the labels of these alone.
  """
  labels = {name for name, number in checks.classes.items() if number and name in example}
  for name in sorted(labels):
    label = np.asarray(example[name])
    if label.ndim != 2 or not np.issubdtype(label.dtype, np.integer):
      continue
    for entry in sorted(set(example) - labels):
      tokens = np.asarray(example[entry])
      is_copied = tokens.shape == label.shape and _is_copy(label, tokens)
      if is_copied and augment is not None:
        augmented = jax.device_get(jax.jit(augment)(example))
        is_copied = _is_copy(augmented[name], augmented[entry])
      if is_copied:
        warnings.warn(
          f"{name}: expected each position's next token, got {entry!r} itself in the first batch, "
          f"so that the student learns to copy it: write {name}[:, :-1] = {entry}[:, 1:] and "
          f"{name}[:, -1] = {data.UNLABELED} (text.pack does), with ignore_label={data.UNLABELED}",
          UserWarning,
          stacklevel=2,
        )


def _is_copy(label: np.ndarray, tokens: np.ndarray) -> bool:
  """Whether all labels [B, T] are the tokens of their positions, and some not the next ones."""
  labeled = label >= 0
  is_same = (label == tokens)[labeled].all()
  is_next = (label[:, :-1] == tokens[:, 1:])[labeled[:, :-1]].all()
  return bool(labeled.any() and is_same and not is_next)


def _check_ignored(task: Task | None, entries: Entries, example: Batch) -> None:
  """Raises a ValueError where a term ignores a number that the task would count.

  Class numbers are marked on the host, for both.
  """
  ignored = entries.numbers | {
    name: own
    for name, (number, own) in entries.classes.items()
    if number == BINARY and np.issubdtype(np.asarray(example[name]).dtype, np.floating)
  }
  for name, own in ignored.items():
    is_read = task is not None and name in (*task.references, *task.figure_references)
    if task is not None and is_read and own not in (None, task.ignore_label):
      raise ValueError(
        f"task: expected the ignore label {own} of {name!r}, as in labels(ignore_label={own}), got "
        f"{task.ignore_label}: pass ignore_label={own} to tasks.regression, binary or multi_label, "
        "too"
      )


def _check_weights(name: str, weights: np.ndarray) -> None:
  """Raises a ValueError for weights of examples that are all 0."""
  if not weights.any():
    raise ValueError(
      f"{name}: expected weights >= 0, not all 0, got only 0: a weight of 0 leaves an example out"
    )
