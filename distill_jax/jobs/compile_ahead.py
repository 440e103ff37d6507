"""Computes what the steps of a config cost on chips that this machine may not have."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from distill_jax.cost.analysis import Analysis
from distill_jax.cost.cached import cached_teacher
from distill_jax.cost.steps import compile_for
from distill_jax.jobs import data
from distill_jax.jobs.config import Config, ConfigError, Training
from distill_jax.jobs.epochs import with_steps
from distill_jax.jobs.plan import select_train_data
from distill_jax.jobs.recipes import Recipe
from distill_jax.models import cast
from distill_jax.trees import batch_specs
from distill_jax.types import Batch, Model, Objective, OnPolicy

ROLES = ("student", "baseline", "teacher")


def compile_config(
  topology: str,
  config: Config,
  *,
  role: str = "student",
  axes: Mapping[str, int] | None = None,
  parts: bool = False,
) -> Analysis:
  """Compiles the train step of one of a config's networks (see `compile_for`).

  Args:
    topology, parts: as in `compile_for`.
    config: its `abstract_batch(rows)` returns the shapes of a batch, if it has one; otherwise they
      are those of its data.
    role: 'student' (the first variant, from the cache where the config has one), 'baseline' or
      'teacher'.
    axes: sizes of the mesh's axes; None: the config's.

  Raises:
    ValueError, ImportError, RuntimeError: as `compile_for`; or there is no such network to train.
  """
  config = with_steps(config)
  model, teacher, objective, training, on_policy = _network(config, role)
  batch = _batch(config, role, training.batch_size)
  cached = _reads_cache(config, role)
  if cached and teacher is not None:
    teacher, batch = cached_teacher(teacher, batch, config.cached_outputs())
  return compile_for(
    topology,
    model,
    teacher,
    objective,
    training.optimizer(),
    batch,
    axes=dataclasses.asdict(config.mesh) if axes is None else axes,
    rules=config.rules(role),
    teacher_rules=() if cached else config.teacher_rules(),
    options=config.step_options(training, on_policy),
    parts=parts,
  )


def describe_cost(config: Config, topology: str, *, role: str = "student") -> str:
  """Returns the table of `compile_config` as text, and how long the configured steps take.

  Raises:
    ValueError, ImportError, RuntimeError: as `compile_config`.
  """
  config = with_steps(config)
  training = _network(config, role)[3]
  analysis = compile_config(topology, config, role=role)
  how = ", from the cache" if _reads_cache(config, role) else ""
  lines = [f"{role}{how}: {training.steps:,} steps of {training.batch_size:,} rows on {analysis}"]
  hours = analysis.hours(training.steps)
  if hours is not None:
    lines.append(
      f"  all steps    {hours:,.2f} hours at the lower bound, {hours * analysis.chips:,.0f} hours "
      "of a chip; no program reaches it"
    )
  if not analysis.fits:
    smaller = f"--config.{_field(role)}.microbatches={2 * training.microbatches}"
    lines.append(f"what may help: more chips, {smaller}, networks that compute in bfloat16")
  return "\n".join(lines)


def _network(
  config: Config, role: str
) -> tuple[Model, Model | None, Objective, Training, OnPolicy | None]:
  if role == "student":
    recipe, objective = _recipe(config), config.variant_objective(config.variants()[0])
    teacher = _in_teacher_dtype(config, config.teacher()) if recipe.teacher else None
    return (
      recipe.train_model or recipe.student,
      teacher,
      objective,
      recipe.training,
      recipe.on_policy,
    )
  if role == "baseline":
    return config.student(), None, config.baseline_objective(), config.student_training, None
  if role != "teacher":
    raise ValueError(f"role: expected one of {ROLES}, got {role!r}")
  teacher = config.teacher()
  if teacher is None or teacher.variables is not None or teacher.ema_update is not None:
    raise ConfigError(
      "teacher: expected one that is trained, got none, one with weights or an EMA of the student: "
      "choose another role"
    )
  return teacher, None, config.baseline_objective(), config.teacher_training, None


def _in_teacher_dtype(config: Config, teacher: Model | None) -> Model | None:
  """Returns the teacher with weights of the dtype in which it teaches."""
  if teacher is None or teacher.ema_update is not None or not config.teacher_dtype:
    return teacher
  dtype, init, variables = jnp.dtype(config.teacher_dtype), teacher.init, teacher.variables
  return teacher._replace(
    init=lambda key, batch: cast(init(key, batch), dtype),
    variables=None if variables is None else cast(variables, dtype),
  )


def _recipe(config: Config) -> Recipe:
  return config.recipe(config.variants()[0])


def _reads_cache(config: Config, role: str) -> bool:
  recipe = _recipe(config)
  return bool(config.cache) and role == "student" and recipe.cached and recipe.teacher == "teacher"


def _field(role: str) -> str:
  return "teacher_training" if role == "teacher" else "student_training"


def _batch(config: Config, role: str, rows: int) -> Batch:
  abstract_batch: Any = getattr(config, "abstract_batch", None)
  if abstract_batch is not None:
    return abstract_batch(rows)
  train = select_train_data(config, role, config.data().train)
  example = next(data.training_batches(config, train, 1))
  return batch_specs(example, rows)
