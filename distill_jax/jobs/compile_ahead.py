"""What the steps of a config cost on chips that may not be here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.cost.analysis import Analysis
from distill_jax.cost.cached import from_cache
from distill_jax.cost.steps import compile_for
from distill_jax.jobs import data
from distill_jax.jobs.config import Config, ConfigError, Training
from distill_jax.jobs.recipes import Recipe
from distill_jax.models import cast
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
  """`compile_for` of the train step of one of a config's networks.

  Args:
    topology, parts: as in `compile_for`.
    axes: of the mesh; None: the config's.
    config: its `abstract_batch(rows)` gives the shapes of a batch, if it has one; otherwise they are read off its
      data.
    role: 'student', the one that is distilled, by its first variant, from the cache where the config has one;
      'baseline', the student alone; or 'teacher'.

  Raises:
    ValueError, ImportError, RuntimeError: as `compile_for`; or there is no such network to train.
  """
  learner, teacher, objective, training, on_policy = _network(config, role)
  batch = _batch(config, role, training.batch_size)
  cached = _reads_cache(config, role)
  if cached and teacher is not None:
    teacher, batch = from_cache(teacher, config.cached_outputs(), batch)
  return compile_for(
    topology,
    learner,
    teacher,
    objective,
    training.optimizer(),
    batch,
    axes=dataclasses.asdict(config.mesh) if axes is None else axes,
    rules=config.rules(role),
    teacher_rules=() if cached else config.teacher_rules(),
    microbatches=training.microbatches,
    augment=config.augment(),
    mix=config.mix(),
    on_policy=on_policy,
    parts=parts,
  )


def describe_cost(config: Config, topology: str, *, role: str = "student") -> str:
  """The table of `compile_config`, and how long the configured steps take.

  Raises:
    ValueError, ImportError, RuntimeError: as `compile_config`.
  """
  training = _network(config, role)[3]
  analysis = compile_config(topology, config, role=role)
  how = ", from the cache" if _reads_cache(config, role) else ""
  lines = [f"{role}{how}: {training.steps:,} steps of {training.batch_size:,} rows on {analysis}"]
  hours = analysis.hours(training.steps)
  if hours is not None:
    lines.append(
      f"  all steps    {hours:,.2f} hours at the floor, {hours * analysis.chips:,.0f} hours of a chip; nothing "
      "reaches the floor"
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
    teacher = _kept(config, config.teacher()) if recipe.teacher else None
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
      "teacher: this config trains none: there is none, it has its weights, or it follows the student"
    )
  return teacher, None, config.baseline_objective(), config.teacher_training, None


def _kept(config: Config, teacher: Model | None) -> Model | None:
  """The teacher, with weights of the dtype that it teaches with."""
  if teacher is None or teacher.ema_update is not None or not config.teacher_dtype:
    return teacher
  dtype, make, own = jnp.dtype(config.teacher_dtype), teacher.init, teacher.variables
  return teacher._replace(
    init=lambda key, batch: cast(make(key, batch), dtype),
    variables=None if own is None else cast(own, dtype),
  )


def _recipe(config: Config) -> Recipe:
  return config.recipe(config.variants()[0])


def _reads_cache(config: Config, role: str) -> bool:
  recipe = _recipe(config)
  return bool(config.cache) and role == "student" and recipe.cached and recipe.teacher == "teacher"


def _field(role: str) -> str:
  return "teacher_training" if role == "teacher" else "student_training"


def _batch(config: Config, role: str, rows: int) -> Batch:
  told: Any = getattr(config, "abstract_batch", None)
  if told is not None:
    return told(rows)
  own = {
    "teacher": config.teacher_train,
    "baseline": config.baseline_train,
    "student": config.student_train,
  }
  example = next(data.training_batches(config, own[role](config.data().train), 1))
  return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in example.items()}
