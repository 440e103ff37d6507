"""Loads the weights that earlier stages of a job exported."""

from pathlib import Path

import jax.numpy as jnp

from distill_jax.jobs import data
from distill_jax.jobs.config import ConfigError, Examples, TrainedTeacher
from distill_jax.jobs.plan import Job, Network, is_complete, networks
from distill_jax.models import cast
from distill_jax.storage.student import load_student
from distill_jax.train.placement import init_on_host
from distill_jax.types import Model, Variables


def teacher_variables_of(job: Job, network: Network) -> Variables | None:
  """Returns the weights of a frozen teacher that was trained in this run, or that teaches in
  another dtype.
  """
  variables, dtype = trained_variables(job, network), job.config.teacher_dtype
  if not dtype:
    return variables
  teacher = network.teacher
  if variables is None and teacher is not None and teacher.ema_update is None:
    variables = teacher.variables
  return None if variables is None else cast(variables, jnp.dtype(dtype))


def trained_variables(job: Job, network: Network) -> Variables | None:
  """Returns the weights of a frozen teacher that was trained in this run, in their own dtype."""
  teacher, folder = network.teacher, network.teacher_folder
  if teacher is None or teacher.ema_update is not None or folder is None:
    return None
  return load_trained(job, network, folder, teacher)


def trained_teacher_of(
  network: Network, variables: Variables | None, train: Examples
) -> TrainedTeacher | None:
  """Returns a network's teacher with its weights; None where it has none before training."""
  teacher = network.teacher
  if teacher is None:
    return None
  variables = teacher.variables if variables is None else variables
  return None if variables is None else TrainedTeacher(teacher, variables, train)


def load_trained(job: Job, network: Network, folder: Path, model: Model) -> Variables:
  """Returns the weights that an earlier stage exported."""
  if not is_complete(folder):
    stage = folder.name.partition("-")[0]
    raise ConfigError(
      f"--stages: {network.name} needs its {stage}, and {folder} has no finished one: add {stage!r}"
    )
  students = networks(job, "student")
  allow_shrunk = any(s.recipe.allow_shrunk for s in students if s.folder == folder)
  example = data.first(job.config, job.splits.train)
  with init_on_host(job.config.make_mesh()):
    return load_student(folder, model, example, allow_shrunk=allow_shrunk)
