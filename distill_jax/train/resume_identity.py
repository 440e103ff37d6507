"""Identifies a run of `fit`, so that it resumes with what it began with."""

from collections.abc import Mapping
from typing import Any

from distill_jax.storage import run_settings
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.arguments import Arguments
from distill_jax.train.inputs import data_identity
from distill_jax.types import TrainState


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
