"""How the networks of a run come about, and what a config must not ask for."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from distill_jax.compression.initialization.provenance import Provenance
from distill_jax.errors import suggest
from distill_jax.types import Batch, Model, Variables


class ConfigError(ValueError):
  """A config that cannot be run; the message names the field, what it got and what it expected."""


def check(
  config: Any,
  name: str,
  *,
  least: float = -math.inf,
  above: float = -math.inf,
  most: float = math.inf,
) -> None:
  """Raises a ConfigError unless the field `name` is finite, `>= least`, `> above` and `<= most`."""
  value = getattr(config, name)
  if math.isfinite(value) and value >= least and value > above and value <= most:
    return
  bounds = [(f">= {least}", least), (f"> {above}", above), (f"<= {most}", most)]
  wanted = " and ".join(text for text, bound in bounds if math.isfinite(bound))
  raise ConfigError(f"{name}: expected a finite number {wanted}, got {value}")


class error_prefix:
  """Puts a field's name in front of ConfigErrors, and makes ConfigErrors of ValueErrors, raised inside."""

  def __init__(self, name: str):
    self.name = name

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if kind is not None and issubclass(kind, ValueError):
      separator = "." if issubclass(kind, ConfigError) else ": "
      raise ConfigError(f"{self.name}{separator}{error}") from error


@dataclasses.dataclass
class Training:
  """How one network is trained: AdamW under a learning rate that warms up linearly and decays along a cosine.

  Attributes:
    steps: optimizer steps.
    batch_size: rows per step, over all devices.
    learning_rate: its peak.
    warmup_steps: steps from 0 to the peak.
    schedule_steps: where the decay ends; 0: at `steps`.
    weight_decay: AdamW's, decoupled.
    microbatches: gradients are accumulated over so many parts of the batch.
  """

  steps: int = 1000
  batch_size: int = 64
  learning_rate: float = 1e-3
  warmup_steps: int = 0
  schedule_steps: int = 0
  weight_decay: float = 0.0
  microbatches: int = 1

  def schedule(self) -> optax.Schedule:
    """The learning rate as a function of the optimizer step."""
    return optax.warmup_cosine_decay_schedule(
      0.0 if self.warmup_steps else self.learning_rate,
      self.learning_rate,
      self.warmup_steps,
      self.schedule_steps or self.steps,
    )

  def optimizer(self) -> optax.GradientTransformation:
    return optax.adamw(self.schedule(), weight_decay=self.weight_decay)

  def validate(self) -> None:
    check(self, "steps", least=1)
    check(self, "batch_size", least=1)
    check(self, "microbatches", least=1)
    check(self, "learning_rate", above=0)
    check(self, "weight_decay", least=0)
    check(self, "schedule_steps", least=0)
    end = self.schedule_steps or self.steps
    if not 0 <= self.warmup_steps < end:
      raise ConfigError(
        f"warmup_steps: expected 0 to {end - 1} (the schedule has {end} steps), got {self.warmup_steps}"
      )
    if end < self.steps:
      warnings.warn(
        f"the learning rate is 0 from step {end} on, and training goes to step {self.steps}: raise schedule_steps",
        stacklevel=2,
      )


class TrainedTeacher(NamedTuple):
  """What an objective may want to know once the teacher has been trained.

  Attributes:
    teacher: the Model.
    variables: its weights.
    train: what the student is distilled on (`Examples`).
  """

  teacher: Model
  variables: Variables
  train: Any


class Recipe(NamedTuple):
  """How the student of one variant comes about.

  Attributes:
    student: what is exported, evaluated and compared.
    training: how it is trained.
    train_model: what distillation trains, where it is more than the student: a cohort that it is a member of, or the
      network that it will be cut out of. None: the student.
    export_fn: the student's weights out of the learner's. None: they are the same.
    export_last: the weights of the last step count, not those of the best evaluation: where they are pruned on the way,
      earlier ones are not yet, and where no label is in the objective no evaluation tells.
    allow_shrunk: whether the exported arrays may be smaller than the student's (`compression.shrink`).
    teacher: who teaches it: 'teacher', an earlier variant with the same seed (an assistant), or '', nobody.
    init_from: whose exported weights it starts from: 'baseline' or an earlier variant, with the same seed; '': random
      ones.
    init_from_teacher: `(own first weights, TrainedTeacher) -> (first weights, where each came from)`, as `compression.inject` gives them;
      both weights are `Variables` of the learner. None: they stay as they are.
    cached: whether it reads the cache, where the config has one; otherwise the teacher is live.
    on_policy: `(student Variables, key, batch) -> batch`, as `train.fit` takes it; None: the data's own sequences.
  """

  student: Model
  training: Training
  train_model: Model | None = None
  export_fn: Callable[[Variables], Variables] | None = None
  export_last: bool = False
  allow_shrunk: bool = False
  teacher: str = "teacher"
  init_from: str = ""
  init_from_teacher: Callable[[Variables, TrainedTeacher], tuple[Variables, Provenance]] | None = (
    None
  )
  cached: bool = True
  on_policy: Callable[[Variables, jax.Array, Batch], Batch] | None = None


def check_recipe(
  recipe: Recipe, earlier: Mapping[str, Recipe], training: Training, generations: int, cache: str
) -> None:
  """Raises a ConfigError, which names the field, for a recipe that cannot be followed.

  Args:
    recipe: of one variant.
    earlier: those of the variants before it.
    training, generations, cache: the config's `student_training`, which is checked already, and fields.
  """
  for field, other in (("teacher", "teacher"), ("init_from", "baseline")):
    name, known = getattr(recipe, field), (other, *earlier)
    if name and name not in known:
      raise ConfigError(
        f"{field}: expected one of {known} or nothing, got {name!r}{suggest(name, known)}"
      )
  if recipe.teacher in earlier and earlier[recipe.teacher].allow_shrunk:
    raise ConfigError(
      f"teacher: {recipe.teacher!r} is cut, and no network of its shape can be checked against it"
    )
  if (
    recipe.init_from in earlier
    and earlier[recipe.init_from].allow_shrunk
    and not recipe.allow_shrunk
  ):
    raise ConfigError(
      f"allow_shrunk: expected True, as that of {recipe.init_from!r}, whose weights it starts from"
    )
  if recipe.init_from_teacher is not None and not recipe.teacher:
    raise ConfigError("init_from_teacher: there is no teacher whose weights could be given")
  if recipe.allow_shrunk and generations > 1:
    raise ConfigError(
      "allow_shrunk: expected False: a student that is cut cannot teach the next generation"
    )
  if recipe.teacher != "teacher" and generations > 1:
    raise ConfigError("teacher: expected 'teacher': a later generation's is the student before it")
  if cache and recipe.cached and recipe.teacher == "teacher" and recipe.on_policy:
    raise ConfigError(
      "on_policy: a cache holds what the teacher said about other sequences: expected cached=False"
    )
  if recipe.training is not training:
    with error_prefix("training"):
      recipe.training.validate()
