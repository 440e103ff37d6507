"""Holds the arguments of `fit`, and what they become on a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from distill_jax import data
from distill_jax.cache import Cache
from distill_jax.data.batches import check_batch_size
from distill_jax.errors import check_integer
from distill_jax.train.inputs import Source, Stream
from distill_jax.train.options import (
  CheckpointOptions,
  Evaluation,
  RunOptions,
  StepOptions,
  check_kind,
)
from distill_jax.types import Batch, Metric, Objective, Task, TrainState


class Arguments(NamedTuple):
  """The arguments of `fit`; of a cache, `teacher` is the Model that reads it.

  `prepare` makes Models of the networks of other libraries, and steps of epochs.
  """

  student: Any
  teacher: Any
  cache: Cache | None
  objective: Objective
  optimizer: optax.GradientTransformation
  source: Source
  steps: int
  epochs: int | None
  batch_size: int
  seed: int
  student_variables: Any
  teacher_variables: Any
  task: Task | None
  evaluation: Evaluation | None
  checkpoints: CheckpointOptions | None
  step: StepOptions
  run: RunOptions


class Inputs(NamedTuple):
  """The mesh, the rows of this process (None: all), one batch, and the teacher's placed
  variables.
  """

  mesh: Mesh
  rows: np.ndarray | None
  example: Batch
  teacher_variables: Any


class Intervals(NamedTuple):
  """Steps in all, and from one evaluation and one checkpoint to the next."""

  steps: int
  evaluate: int
  save: int


class Run(NamedTuple):
  """A prepared run.

  Attributes:
    arguments: of `fit`.
    step_fn: compiled; it consumes the state that it gets.
    teacher_variables: placed; `()` without a frozen teacher.
    teacher_fingerprint: of them, before training.
    stream: `start step -> host batches` of this process.
    place: a host batch -> what `step_fn` takes.
    num_rows: rows of a batch of this process.
    example: shapes of the first batch's entries.
    intervals: see `Intervals`.
    evaluate: `state -> scores`, or None.
    task: of the evaluation.
    best: the metric that chooses the best variables.
    identity: what must be equal for a run to resume.
    settings: what is said where it differs when a run resumes.
  """

  arguments: Arguments
  step_fn: Callable
  teacher_variables: Any
  teacher_fingerprint: str
  stream: Stream
  place: Callable[[Batch], Batch]
  num_rows: int
  example: Mapping[str, jax.ShapeDtypeStruct]
  intervals: Intervals
  evaluate: Callable[[TrainState], dict[str, float]] | None
  task: Task
  best: Metric
  identity: dict[str, Any]
  settings: dict[str, str]


def check_options(task: Any, step: Any, run: Any) -> None:
  """Checks the types of `fit`'s arguments.

  Raises:
    ValueError: one is of another type; it is named, with what makes the right one.
  """
  check_kind("task", task, (Task, type(None)), "a Task such as tasks.classification(), or None")
  check_kind("step", step, (StepOptions,), "StepOptions(...)")
  check_kind("run", run, (RunOptions,), "RunOptions(...)")


def check_length(steps: Any, epochs: Any) -> int:
  """Returns the number of steps; 0 where `epochs` is given in place of it.

  Raises:
    ValueError: both are given or neither is, or one is no integer >= 1.
  """
  if epochs is None:
    if steps is None:
      raise ValueError("steps: expected an integer >= 1, got None: pass steps=1000 or epochs=10")
    return check_integer("steps", steps, 1)
  check_integer("epochs", epochs, 1)
  if steps is not None:
    raise ValueError(f"epochs: expected None with steps={steps}, got {epochs}: pass one of them")
  return 0


def count_steps(source: Source, epochs: int, batch_size: int) -> int:
  """Returns the number of steps of some epochs.

  Raises:
    ValueError: the length of the source is not known.
  """
  if isinstance(source, data.Source):
    check_batch_size(batch_size, len(source), source.name)
    return epochs * (len(source) // batch_size)
  steps = getattr(source, "steps_per_epoch", None)
  if not steps:
    name = getattr(source, "name", type(source).__name__)
    raise ValueError(
      f"epochs: expected a source of a known length, got {name}, which has none: pass steps= in "
      "place of epochs="
    )
  return epochs * steps
