"""Holds the arguments of `fit`, and what they become on a mesh."""

from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from distill_jax.cache import Cache
from distill_jax.train.inputs import Source
from distill_jax.train.options import (
  CheckpointOptions,
  Evaluation,
  RunOptions,
  StepOptions,
  check_kind,
)
from distill_jax.types import Batch, Objective, Task


class Arguments(NamedTuple):
  """The arguments of `fit`; of a cache, `teacher` is the Model that reads it.

  `prepare` makes Models of the networks of other libraries.
  """

  student: Any
  teacher: Any
  cache: Cache | None
  objective: Objective
  optimizer: optax.GradientTransformation
  source: Source
  steps: int
  batch_size: int
  seed: int
  student_variables: Any
  teacher_variables: Any
  task: Task | None
  evaluation: Evaluation | None
  checkpoints: CheckpointOptions | None
  step: StepOptions
  run: RunOptions


def check_options(task: Any, step: Any, run: Any) -> None:
  """Checks the types of `fit`'s arguments.

  Raises:
    ValueError: one is of another type; it is named, with what makes the right one.
  """
  check_kind("task", task, (Task, type(None)), "a Task such as tasks.classification(), or None")
  check_kind("step", step, (StepOptions,), "StepOptions(...)")
  check_kind("run", run, (RunOptions,), "RunOptions(...)")


class Inputs(NamedTuple):
  """The mesh, the rows of this process (None: all), one batch, and the teacher's placed
  variables.
  """

  mesh: Mesh
  rows: np.ndarray | None
  example: Batch
  teacher_variables: Any
