"""Reads the batches that `fit` trains on, and checks before training what does not fit."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.cache import Cache
from distill_jax.data.balance import check_balance
from distill_jax.data.label_checks import IgnoreLabel, ignore_label_of, mark_entries
from distill_jax.train.batch_checks import Checks, check_entries, checked_batch
from distill_jax.train.batch_errors import name_field, name_shapes
from distill_jax.train.options import Batches, RunOptions
from distill_jax.types import Batch, Objective

Source = data.Source | data.Pipeline | Callable[[int], Iterable[Mapping[str, Any]]]
Stream = Callable[[int], Iterable[Mapping[str, Any]]]


def as_source(field: str, examples: Any) -> Any:
  """Returns examples as a `Source` or `Pipeline`; those that know their rows (`for_rows`) stay.

  Raises:
    ValueError: it names the field, with what makes the right type.
  """
  if isinstance(examples, data.Source):
    return examples
  if hasattr(examples, "for_rows"):
    is_training = field == "source"
    if not (callable(examples) if is_training else hasattr(examples, "__iter__")):
      expected = "a data.stream.Stream" if is_training else "a data.stream.EvalStream"
      raise ValueError(f"{field}: expected {expected}, got a {type(examples).__name__}")
    return examples
  with name_field(field):
    examples = data.from_iterable(examples)
    if isinstance(examples, data.Pipeline):
      examples.first()
  return examples


def batches_of(
  source: Source,
  batch_size: int,
  seed: int,
  run: RunOptions,
  *,
  checks: Checks,
  cache: Cache | None = None,
  rows: np.ndarray | None = None,
) -> Stream:
  """Returns `start step -> batches`; those of a pipeline of your own are checked.

  Args:
    source, batch_size, seed, run: as in `fit`.
    checks: of each batch.
    cache: adds the teacher's outputs to each batch; None: nothing.
    rows: those of each batch that this process reads; None: all.
  """
  if cache is not None:
    stream = batches_of(source, batch_size, seed, run, checks=checks, rows=rows)
    return lambda start: map(cache.add_columns, stream(start))
  if isinstance(source, data.Source):
    if run.balance is not None:
      ignore_label = ignore_label_of(checks.ignore_label, run.balance)
      ignore_label = run.ignore_label if ignore_label is None else ignore_label
      check_balance(source, run.balance, ignore_label)
    entries = _unchecked(source, checks.classes)
    # All at once, before training.
    check_entries(data.class_numbers(source.arrays, entries, checks.ignore_label), checks)
    read = functools.partial(
      data.batches,
      source,
      batch_size,
      seed=seed,
      num_views=run.num_views,
      balance=run.balance,
      rows=rows,
    )
    return lambda start: _marked(read(start=start), entries, checks.ignore_label)
  if run.balance is not None:
    raise ValueError(
      f"balance: expected None for batches of your own, got {run.balance!r}: sample them balanced, "
      "or make a Source of them (data.from_iterable(...).load())"
    )
  pipeline = local_share(source, batch_size, rows)
  return lambda start: _checked("source", pipeline(start), checks, start)


def _unchecked(
  source: data.Source, classes: Mapping[str, int | None] | None
) -> dict[str, int | None]:
  """Returns the entries with labels that the source did not check when it was made."""
  return {
    name: number
    for name, number in (classes or {}).items()
    if name in source.arrays and (name != "label" or source.classes is None)
  }


def _marked(
  batches: Iterable[Mapping[str, Any]], entries: Iterable[str], ignore_label: IgnoreLabel
) -> Iterator[Mapping[str, Any]]:
  """Yields the batches with `UNLABELED` in place of the ignore label."""
  for batch in batches:
    yield {**batch, **mark_entries(batch, entries, ignore_label)}


def _checked(
  field: str,
  batches: Iterable[Mapping[str, Any]],
  checks: Checks,
  start: int = 0,
) -> Iterator[Mapping[str, Any]]:
  """Yields copies of checked batches, with `UNLABELED` in place of the ignore label.

  Errors say the field and the batch's number, counted from `start`.
  """
  with name_field(field):
    for number, batch in enumerate(batches, start):
      # A copy: the transfer is asynchronous, and a pipeline may fill the same buffers again
      # meanwhile.
      batch = {name: np.array(x) for name, x in data.to_batch(batch).items()}
      with name_field(f"batch {number}, counted from 0"):
        batch = checked_batch(batch, checks)
      yield batch


def local_share(pipeline: Any, batch_size: int, rows: np.ndarray | None) -> Any:
  """Returns a pipeline that yields these rows of each batch, if it has `for_rows`; else it must
  know them itself.

  Raises:
    ValueError: the pipeline's batches have another size.
  """
  if rows is None or not hasattr(pipeline, "for_rows"):
    return pipeline
  if pipeline.batch_size != batch_size:
    raise ValueError(
      f"batch_size: expected the pipeline's {pipeline.batch_size} rows, got {batch_size}: make "
      "them equal"
    )
  return pipeline.for_rows(rows)


def evaluation_batches(
  examples: Batches,
  batch_size: int,
  rows: np.ndarray | None,
  *,
  classes: Mapping[str, int | None] | None = None,
  ignore_label: IgnoreLabel = None,
  field: str = "evaluation",
) -> Callable[[], Iterator[Mapping[str, Any]]]:
  """Returns a function that iterates over the batches of an evaluation, or the given rows of each.

  Args:
    examples: a `Source`, a `Pipeline` or batches.
    batch_size: rows over all processes, of a `Source`.
    rows: those of each batch that this process reads; None: all.
    classes, ignore_label: of the labels, as in `data.check_batch`.
    field: what errors name.

  Raises (while it iterates):
    ValueError: a batch does not fit; as in `data.check_batch`.
  """
  if isinstance(examples, data.Source):
    entries = _unchecked(examples, classes)
    return lambda: _marked(
      data.eval_batches(examples, batch_size, rows=rows), entries, ignore_label
    )
  pipeline = local_share(examples, batch_size, rows)
  checks = Checks({"label": None} if classes is None else classes, ignore_label)
  return lambda: _checked(field, pipeline, checks)


def data_identity(source: Any) -> str:
  """Returns a text that identifies the examples, for the run's identity."""
  if isinstance(source, data.Source):
    return f"{source.name}:{source.digest}"
  return getattr(source, "identity", getattr(source, "__qualname__", type(source).__qualname__))


def next_batch(batches: Iterator, step: int, batch_size: int, num_rows: int) -> Batch:
  """Returns the next batch; a shorter one is filled up with its last row under 'where'.

  Args:
    batches: of this process.
    step: its number, for messages.
    batch_size: rows over all processes.
    num_rows: rows of this process.

  Raises:
    ValueError: there is none, it has more rows, or fewer where several processes share a batch.
  """
  batch = next(batches, None)
  if batch is None:
    raise ValueError(
      f"source: expected batches for all steps, got none at step {step}: repeat the data (a list "
      f"or loader is repeated without epochs=), or train for steps={step - 1}"
    )
  rows = data.count_rows(batch)
  if rows > num_rows or (rows < num_rows != batch_size):
    local = "" if num_rows == batch_size else f", of which this process reads {num_rows}"
    raise ValueError(
      f"source: expected batches of batch_size {batch_size} rows{local}, got {rows} at step {step}"
    )
  return batch if rows == num_rows else fill_up(batch, num_rows)


def fill_up(batch: Batch, rows: int) -> dict[str, np.ndarray]:
  """Returns a batch of `rows` rows: its last row is repeated, and 'where' is False there."""
  where = batch.get("where", np.ones(data.count_rows(batch), bool))
  extra = rows - len(where)
  filled = {
    name: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]) for name, x in batch.items()
  }
  return filled | {"where": np.append(where, np.zeros(extra, bool))}


def check_objective(objective: Any) -> None:
  """Checks that an objective is one.

  Raises:
    ValueError: it is not; the message says what makes one.
  """
  if not isinstance(objective, Objective):
    raise ValueError(
      f"objective: expected an Objective, got {type(objective).__name__}: use objectives.weighted"
    )


def check_classes(classes: Mapping[str, int | None], source: Any) -> None:
  """Checks that the student has as many classes as the data.

  Raises:
    ValueError: it has fewer.
  """
  num_classes = classes.get("label")
  data_classes = getattr(source, "classes", None)
  if num_classes and data_classes is not None and num_classes < data_classes:
    raise ValueError(
      f"student: expected the {data_classes} classes of the data set {source.name!r}, got "
      f"{num_classes}"
    )


def has_labels(
  examples: Batches, classes: Mapping[str, int | None] | None, ignore_label: IgnoreLabel
) -> bool:
  """Returns whether a set in memory has a label of a class; True for all other examples."""
  if not isinstance(examples, data.Source) or not classes:
    return True
  labels = mark_entries(examples.arrays, classes, ignore_label)
  return any((x >= 0).any() for x in labels.values())


def check_evaluation(
  step: Callable,
  arguments: tuple,
  examples: Batches,
  example: Batch,
  classes: Mapping[str, int | None],
  ignore_label: IgnoreLabel,
) -> Any:
  """Checks before training what the first evaluation would find; returns its statistics' shapes.

  Args:
    step, arguments: of the evaluation; only shapes are computed.
    examples: of the evaluation; all of those in memory are checked.
    example: their first batch.
    classes, ignore_label: of the labels, as in `evaluation_batches`.

  Raises:
    ValueError: it names the labels, outputs or teacher that do not fit.
  """
  with name_field("evaluation"):
    if isinstance(examples, data.Source):
      data.class_numbers(examples.arrays, _unchecked(examples, classes), ignore_label)
    elif isinstance(examples, data.Pipeline) and examples.length is not None:
      for number, batch in enumerate(examples):
        with name_field(f"batch {number}, counted from 0"):
          data.check_batch(batch, classes, ignore_label)
        if data.shape_change(batch, example):
          with name_shapes(f"batch {number}, counted from 0", batch, example):
            jax.eval_shape(step, *arguments, batch)
    else:
      data.check_batch(example, classes, ignore_label)
    statistics, _ = jax.eval_shape(step, *arguments, example)
  return statistics
