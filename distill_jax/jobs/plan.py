"""Plans a job: the networks that it trains, where they are stored, how they learn, and which
teacher they have.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from distill_jax.jobs.config import Config, Examples, Recipe, Splits, TrainedTeacher, Training
from distill_jax.storage.student import DESCRIPTION, WEIGHTS
from distill_jax.types import Model, Objective

ROLES = ("teacher", "baseline", "student")  # A student may start from its baseline.
STAGES = ("teacher", "cache", "baseline", "student", "report")
EXTRA_STAGES = ("cache_estimate", "cache_inspect", "cache_verify")  # They run on request only.
RESULT = "result.json"
STOPPED = "stopped"
"""The entry of result.json that says why training ended before its last step; '' if it did not."""
ORIGINS = "origins.txt"
"""Where a network's first weights came from, if some came from the teacher."""
PSEUDO_LABELS = "pseudo_labels"
"""Folder of the answers of teachers that students are trained on in place of labels."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A config with what its stages share; its Models are built once, on first use.

  Attributes:
    config: validated.
    folder: the run's; each trained network has a folder of its own in it.
    seeds: the students' and the baselines'.
    splits: the data.
    run: what identifies the run, for the report.
    profile_steps: steps of each training that are traced; None: none.
    teacher: folder of a finished teacher of another run; None: this run trains its own.
  """

  config: Config
  folder: Path
  seeds: tuple[int, ...]
  splits: Splits
  run: Mapping[str, Any]
  profile_steps: range | None = None
  teacher: Path | None = None

  @property
  def cache(self) -> str:
    """The cache's folder or URL; '' without one."""
    return self.config.cache.replace("{workdir}", str(self.folder))

  @functools.cached_property
  def teacher_model(self) -> Model | None:
    return self.config.teacher()

  @functools.cached_property
  def student_model(self) -> Model:
    return self.config.student()

  @functools.cached_property
  def recipes(self) -> dict[str, Recipe]:
    """The recipe of each variant."""
    return self.config.recipes()


class Network(NamedTuple):
  """One network to train.

  Attributes:
    role: 'teacher', 'baseline' or 'student'.
    seed: of its training.
    folder: where it is stored.
    recipe: how it is built and trained.
    objective: returns what it minimizes from the trained teacher, or None before there is one.
    teacher: its teacher; None: it has none.
    teacher_folder: where the teacher's weights are; None: the teacher carries them.
    init_folder: where the weights are from which it starts; None: it initializes its own.
    generation: of a student, from 1; each starts from random weights.
    variant: name of a student among `Config.variants`.
    cached: whether it learns from cached teacher outputs.
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
    """The Model that is exported, evaluated and compared."""
    return self.recipe.student

  @property
  def train_model(self) -> Model:
    """The Model that is trained."""
    return self.recipe.train_model or self.recipe.student

  @property
  def training(self) -> Training:
    return self.recipe.training

  @property
  def name(self) -> str:
    return self.folder.name

  @property
  def train_seed(self) -> int:
    """The seed; of later generations another one that follows from it."""
    if self.generation == 1:
      return self.seed
    return int(np.random.SeedSequence([self.seed, self.generation]).generate_state(1)[0])

  @property
  def complete(self) -> bool:
    return is_complete(self.folder)


def networks(job: Job, role: str) -> list[Network]:
  """Returns the networks of a role: students by generation, seed and variant; no teacher where none
  is trained.
  """
  config = job.config
  if role == "student":
    return _students(job)
  if role == "baseline":
    baseline = _without_teacher(job, role, job.student_model, config.student_training)
    return [baseline._replace(seed=seed, folder=_folder(job, role, seed)) for seed in job.seeds]
  if not _needs_training(job.teacher_model):
    return []
  return [_without_teacher(job, role, job.teacher_model, config.teacher_training)]


def one_per_variant(job: Job, role: str) -> list[Network]:
  """Returns one network of each variant of a role: seeds and generations have the same shapes."""
  by_variant: dict[str, Network] = {}
  for network in networks(job, role):
    by_variant.setdefault(network.variant, network)
  return list(by_variant.values())


def train_data(job: Job, role: str) -> Examples:
  """Returns the training examples of a role."""
  return select_train_data(job.config, role, job.splits.train)


def select_train_data(config: Config, role: str, train: Examples) -> Examples:
  """Returns what the networks of a role are trained on, from the training split."""
  select = {
    "teacher": config.teacher_train,
    "baseline": config.baseline_train,
    "student": config.student_train,
  }
  return select[role](train)


def is_complete(folder: Path) -> bool:
  """Whether a network was trained and exported there."""
  return all((folder / name).exists() for name in (RESULT, WEIGHTS, DESCRIPTION))


def _without_teacher(job: Job, role: str, model: Model, training: Training) -> Network:
  objective = job.config.baseline_objective()
  recipe = Recipe(model, training, teacher="")
  seed = job.config.teacher_seed
  return Network(role, seed, _teacher_folder(job, role), recipe, lambda trained_teacher: objective)


def _students(job: Job) -> list[Network]:
  return [
    _student(job, variant, seed, generation)
    for generation in range(1, job.config.generations + 1)
    for seed in job.seeds
    for variant in job.recipes
  ]


def _student(job: Job, variant: str, seed: int, generation: int) -> Network:
  config, recipe = job.config, job.recipes[variant]
  teacher, teacher_folder = _teacher(job, variant, seed, generation)
  reads_cache = bool(job.cache) and recipe.cached and recipe.teacher == "teacher"
  return Network(
    "student",
    seed,
    _folder(job, variant, seed, generation),
    recipe,
    functools.partial(config.variant_objective, variant),
    teacher=teacher,
    teacher_folder=teacher_folder,
    init_folder=_folder(job, recipe.init_from, seed) if recipe.init_from else None,
    generation=generation,
    variant=variant,
    cached=reads_cache and generation == 1,
  )


def _teacher(
  job: Job, variant: str, seed: int, generation: int
) -> tuple[Model | None, Path | None]:
  """Returns a student's teacher, and where its weights are."""
  recipes, name = job.recipes, job.recipes[variant].teacher
  if generation > 1:
    return recipes[variant].student, _folder(job, variant, seed, generation - 1)
  if not name:
    return None, None
  if name in recipes:
    return recipes[name].student, _folder(job, name, seed)
  teacher = job.teacher_model
  return teacher, _teacher_folder(job, name) if _needs_training(teacher) else None


def _teacher_folder(job: Job, name: str) -> Path:
  """Returns the folder of the teacher or, until it has its seed, of the baseline."""
  return job.teacher if job.teacher is not None and name == "teacher" else job.folder / name


def _folder(job: Job, name: str, seed: int, generation: int = 1) -> Path:
  """Returns the folder of the baseline, or of a variant's student."""
  if name == "baseline":
    return job.folder / f"baseline-{seed}"
  student = f"student-{name}-{seed}" if name else f"student-{seed}"
  return job.folder / (student if generation == 1 else f"{student}-gen{generation}")


def _needs_training(teacher: Model | None) -> TypeGuard[Model]:
  return teacher is not None and teacher.ema_update is None and teacher.variables is None
