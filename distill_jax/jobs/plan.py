"""A job and the networks it trains: where they are kept, how they learn, and who teaches them."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from distill_jax.jobs.config import Config, Examples, Recipe, Splits, TrainedTeacher, Training
from distill_jax.storage.student import DESCRIPTION, WEIGHTS
from distill_jax.types import Model, Objective

ROLES = ("teacher", "baseline", "student")  # a student may start from its baseline
STAGES = ("teacher", "cache", "baseline", "student", "report")
EXTRA_STAGES = ("cache_estimate", "cache_inspect", "cache_verify")  # run when they are asked for
RESULT = "result.json"
ORIGINS = "origins.txt"  # of the first weights, where some came from the teacher


class Job(NamedTuple):
  """A config with what its stages share.

  Attributes:
    config: validated.
    folder: of the run; each trained network has a folder of its own in it.
    seeds: of the student and the baseline.
    splits: the data.
    run: what identifies the run, for the report.
    profile_steps: of each training, that are traced; None: none.
  """

  config: Config
  folder: Path
  seeds: tuple[int, ...]
  splits: Splits
  run: Mapping[str, Any]
  profile_steps: range | None = None


class Network(NamedTuple):
  """One network to train: where, how, and taught by whom.

  Attributes:
    recipe: how it comes about.
    objective: what it minimizes, given the trained teacher, or None while there is none.
    teacher: None for a network that has none.
    teacher_folder: where the teacher's weights are, if it does not carry them.
    init_folder: where the weights are that it starts from, if it does not make its own.
    generation: of a student, from 1; each is initialized anew.
    variant: of a student: `Config.variants`.
    cached: whether it learns from what the teacher said earlier.
  """

  role: str
  seed: int
  folder: Path
  recipe: Recipe
  objective: Callable[[TrainedTeacher | None], Objective]
  teacher: Model | None = None
  teacher_folder: Path | None = None
  init_folder: Path | None = None
  generation: int = 1
  variant: str = ""
  cached: bool = False

  @property
  def model(self) -> Model:
    """What is exported, evaluated and compared."""
    return self.recipe.student

  @property
  def train_model(self) -> Model:
    """What is trained."""
    return self.recipe.train_model or self.recipe.student

  @property
  def training(self) -> Training:
    return self.recipe.training

  @property
  def name(self) -> str:
    return self.folder.name

  @property
  def own_seed(self) -> int:
    """Of the first generation, the seed, as for the baseline; of each further one, another that follows from it."""
    if self.generation == 1:
      return self.seed
    return int(np.random.SeedSequence([self.seed, self.generation]).generate_state(1)[0])

  @property
  def complete(self) -> bool:
    return is_complete(self.folder)


def networks(job: Job, role: str) -> list[Network]:
  """The networks of a role: students by generation, seed and variant; no teacher where none has to be trained."""
  config = job.config
  if role == "student":
    return _students(job)
  if role == "baseline":
    alone = _without_teacher(job, role, config.student(), config.student_training)
    return [alone._replace(seed=seed, folder=job.folder / f"{role}-{seed}") for seed in job.seeds]
  teacher = config.teacher()
  return (
    [_without_teacher(job, role, teacher, config.teacher_training)]
    if _to_be_trained(teacher)
    else []
  )


def one_per_variant(job: Job, role: str) -> list[Network]:
  """One network of each variant of a role: seeds and generations differ in nothing that can be known beforehand."""
  found: dict[str, Network] = {}
  for network in networks(job, role):
    found.setdefault(network.variant, network)
  return list(found.values())


def train_data(job: Job, role: str) -> Examples:
  """What the networks of a role are trained on."""
  config = job.config
  own = {
    "teacher": config.teacher_train,
    "baseline": config.baseline_train,
    "student": config.student_train,
  }
  return own[role](job.splits.train)


def is_complete(folder: Path) -> bool:
  """Whether a network was trained and exported there."""
  return all((folder / name).exists() for name in (RESULT, WEIGHTS, DESCRIPTION))


def _without_teacher(job: Job, role: str, model: Model, training: Training) -> Network:
  objective = job.config.baseline_objective()
  recipe = Recipe(model, training, teacher="")
  return Network(
    role, job.config.teacher_seed, job.folder / role, recipe, lambda trained_teacher: objective
  )


def _students(job: Job) -> list[Network]:
  config, teacher = job.config, job.config.teacher()
  recipes = config.recipes()

  def folder(name: str, seed: int, generation: int = 1) -> Path:
    """Of 'teacher', 'baseline' or a variant."""
    if name == "teacher":
      return job.folder / name
    first = (
      f"{name}-{seed}"
      if name == "baseline"
      else f"student-{name}-{seed}"
      if name
      else f"student-{seed}"
    )
    return job.folder / (first if generation == 1 else f"{first}-gen{generation}")

  def teacher_of(generation: int, seed: int, variant: str) -> tuple[Model | None, Path | None]:
    name = recipes[variant].teacher
    if generation > 1:
      return recipes[variant].student, folder(variant, seed, generation - 1)
    if not name:
      return None, None
    if name in recipes:
      return recipes[name].student, folder(name, seed)
    return teacher, folder(name, seed) if _to_be_trained(teacher) else None

  def student(generation: int, seed: int, variant: str) -> Network:
    recipe = recipes[variant]
    return Network(
      "student",
      seed,
      folder(variant, seed, generation),
      recipe,
      functools.partial(config.variant_objective, variant),
      *teacher_of(generation, seed, variant),
      folder(recipe.init_from, seed) if recipe.init_from else None,
      generation,
      variant,
      bool(config.cache) and recipe.cached and recipe.teacher == "teacher" and generation == 1,
    )

  generations = range(1, config.generations + 1)
  return [student(g, seed, name) for g in generations for seed in job.seeds for name in recipes]


def _to_be_trained(teacher: Model | None) -> TypeGuard[Model]:
  return teacher is not None and teacher.ema_update is None and teacher.variables is None
