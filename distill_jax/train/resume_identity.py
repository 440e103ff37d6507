"""Identifies a run of `fit`, so that it resumes with what it began with, and so that all processes
train the same one.
"""

from collections.abc import Mapping
from typing import Any

from distill_jax import data
from distill_jax.storage import run_settings
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.arguments import Arguments, Inputs, Intervals
from distill_jax.train.inputs import data_identity
from distill_jax.train.measure import Measure
from distill_jax.types import Batch, TrainState


def resume_settings(arguments: Arguments) -> dict[str, str]:
  """Returns what is said where it differs when a run resumes."""
  return run_settings.runtime() | run_settings.describe(
    objective=arguments.objective, optimizer=arguments.optimizer, step=arguments.step
  )


def run_identity(
  arguments: Arguments, state: TrainState, teacher_fingerprint: str
) -> dict[str, Any]:
  """Returns what must be equal for a run to resume."""
  terms = state.params["objective"]
  cache, checkpoints = arguments.cache, arguments.checkpoints
  start, evaluation = arguments.student_variables, arguments.evaluation
  return {
    "seed": arguments.seed,
    "num_views": arguments.run.num_views,
    "batch_size": arguments.batch_size,
    **({} if arguments.run.balance is None else {"balance": arguments.run.balance}),
    "teacher": teacher_fingerprint if cache is None else cache.digest,
    "data": data_identity(arguments.source),
    **({} if evaluation is None else {"evaluation": data_identity(evaluation.data)}),
    "terms": ", ".join(terms) if isinstance(terms, Mapping) else "",
    "optimizer": run_settings.transformations(arguments.optimizer),
    **({} if start is None else {"student_variables": fingerprint(start)}),
    **({} if checkpoints is None else checkpoints.identity),
  }


def process_settings(
  arguments: Arguments, inputs: Inputs, state: TrainState, measure: Measure, intervals: Intervals
) -> dict[str, Any]:
  """Returns what must be equal on all processes in addition to `run_identity`: what decides which
  computations they start together.
  """
  run, evaluation, checkpoints = arguments.run, arguments.evaluation, arguments.checkpoints
  mesh = {name: int(size) for name, size in inputs.mesh.shape.items()}
  return {
    **intervals._asdict(),
    "start": fingerprint(state),
    "batch": _shapes(inputs.example),
    "checkpoints": checkpoints is not None,
    "best": [metric.name for metric in (measure.best, *measure.evaluated.metrics)],
    "classes": dict(measure.checks.classes),
    "batches of the evaluation": None if evaluation is None else _length(evaluation.data),
    "patience": None if evaluation is None else evaluation.patience,
    "log_every": run.log_every,
    "max_skips": run.max_skips,
    "ignore_label": run.ignore_label,
    "profile_steps": str(run.profile_steps),
    "mesh": mesh,
    "rules": str(run.rules),
    "teacher_rules": str(run.teacher_rules),
  }


def _length(examples: Any) -> int | None:
  """Returns the number of examples in memory, or of batches; None: it is unknown."""
  return len(examples) if isinstance(examples, data.Source) else getattr(examples, "length", None)


def _shapes(batch: Batch) -> dict[str, str]:
  return {name: f"{x.dtype}{list(x.shape)}" for name, x in batch.items()}
