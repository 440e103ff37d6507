"""The batches that `fit` trains on, and what does not fit found before training."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax import data, metrics
from distill_jax.cache import Cache
from distill_jax.errors import suggest
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.saver import student_of
from distill_jax.train.step import make_eval_step
from distill_jax.types import Batch, Model, Objective, TrainState


def batches_of(
  source,
  batch_size,
  seed,
  num_views,
  classes: int | None = None,
  ignore_label: int | None = None,
  cached: Cache | None = None,
  rows: np.ndarray | None = None,
) -> Callable[[int], Iterable[Mapping[str, Any]]]:
  """`start step -> batches`, or the given rows of each; those of a pipeline of one's own are checked, where the
  labels' classes are known."""
  if cached is not None:
    plain = batches_of(source, batch_size, seed, num_views, classes, ignore_label, rows=rows)
    return lambda start: map(cached.join, plain(start))
  if isinstance(source, data.Source):
    return lambda start: data.batches(
      source, batch_size, seed=seed, start=start, num_views=num_views, rows=rows
    )
  source = local_share(source, batch_size, rows)

  def checked(start: int) -> Iterator[Mapping[str, Any]]:
    for batch in source(start):
      # A copy: the transfer is asynchronous, and a pipeline may fill the same buffers again meanwhile.
      batch = {name: np.array(x) for name, x in batch.items()}
      data.check_batch(batch, classes, ignore_label)
      if ignore_label is not None and batch["label"].ndim == 1:
        batch["label"] = np.where(batch["label"] == ignore_label, data.UNLABELED, batch["label"])
      yield batch

  return checked


def local_share(pipeline, batch_size: int, rows: np.ndarray | None):
  """A pipeline that gives these rows of each batch, if it can be told so; else it must know them itself."""
  if rows is None or not hasattr(pipeline, "for_rows"):
    return pipeline
  if pipeline.batch_size != batch_size:
    raise ValueError(
      f"the pipeline has batches of {pipeline.batch_size} rows, expected batch_size {batch_size}"
    )
  return pipeline.for_rows(rows)


def evaluation_batches(
  validation, batch_size: int, rows: np.ndarray | None
) -> Iterable[Mapping[str, Any]]:
  """The batches of an evaluation, or the given rows of each."""
  if isinstance(validation, data.Source):
    return data.eval_batches(validation, batch_size, rows=rows)
  return local_share(validation, batch_size, rows)


def data_identity(source) -> str:
  """What tells the examples from others, for the run's identity."""
  if not isinstance(source, data.Source):
    return getattr(source, "identity", getattr(source, "__qualname__", type(source).__qualname__))
  return f"{source.name}:{fingerprint(dict(source.arrays))}"


def next_batch(batches: Iterator, step: int, batch_size: int, expected: int) -> Batch:
  """The next batch, refused if it has not the size of all others.

  Args:
    expected: rows of this process, where several share the `batch_size`.
  """
  batch = next(batches, None)
  if batch is None:
    raise ValueError(f"the data ended before step {step}: a source must go on for all steps")
  rows = {len(x) for x in batch.values()}
  if rows != {expected}:
    share = "" if expected == batch_size else f", of which this process gives {expected}"
    raise ValueError(
      f"the batch of step {step} has {sorted(rows)} rows, expected batch_size {batch_size}{share}"
    )
  return batch


def check_counts(**counts: int) -> None:
  """Refuses what is less than 1."""
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f"{name}: expected an integer >= 1, got {count}")


def check_kinds(student, teacher, objective, source) -> None:
  """Refuses arguments in one another's place."""
  for name, value in {"student": student, "teacher": teacher}.items():
    if not isinstance(value, Model) and (value is not None or name == "student"):
      raise ValueError(
        f"{name}: expected a Model, got {type(value).__name__}: wrap it with from_nnx, from_linen or from_apply"
      )
  if not isinstance(objective, Objective):
    raise ValueError(
      f"objective: expected an Objective (objectives.weighted), got {type(objective).__name__}"
    )
  if not isinstance(source, data.Source) and not callable(source):
    raise ValueError(
      f"source: expected a data.Source or a function start -> batches, got {type(source).__name__}"
    )


def classes_of(student: Model, state: TrainState, example) -> int | None:
  """The width of the student's logits, or of its head, if it has any."""
  apply = functools.partial(student.apply, train=False, key=None)
  outputs = jax.eval_shape(lambda v: apply(*v, example)[0], student_of(state))
  if "logits" in outputs:
    return outputs["logits"].shape[-1]
  return outputs["head"][0].shape[-1] if "head" in outputs else None


def check_classes(classes: int | None, source) -> None:
  """Refuses a student with fewer classes than the data."""
  wanted = getattr(source, "classes", None)
  if classes is not None and wanted is not None and classes < wanted:
    raise ValueError(
      f"the student has {classes} classes and the data set {source.name!r} has {wanted}"
    )


def check_validation(
  student: Model, state: TrainState, validation, batch_size: int, classes, best
) -> None:
  """Finds before training what the first evaluation, or the end, would find."""
  name, direction = best
  if direction not in ("max", "min"):
    raise ValueError(f"best: expected (score, 'max' or 'min'), got {best}")
  if isinstance(validation, data.Source):
    check_classes(classes, validation)
    if (validation.arrays["label"] < 0).all():
      raise ValueError(
        f"validation: no example of {validation.name!r} has a label, so nothing can be evaluated"
      )
    batch = next(data.eval_batches(validation, batch_size))
  else:
    batch = next(iter(validation))
    data.check_batch(batch, classes)
  counts = jax.eval_shape(make_eval_step(student), student_of(state), (), batch)
  scores = metrics.summary(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), counts))
  if name not in scores:
    raise ValueError(f"best: there is no score {name!r}{suggest(name, scores)}")
