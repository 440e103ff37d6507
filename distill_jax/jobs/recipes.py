"""Defines how the networks of a run are built and trained, and checks what a config asks for."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optax

from distill_jax.compression.initialization.provenance import Provenance
from distill_jax.errors import suggest
from distill_jax.types import Model, OnPolicy, Variables


class ConfigError(ValueError):
  """Raised for a config that cannot be run; the message names the field, what was expected and what
  came.
  """


def check(
  config: Any,
  name: str,
  *,
  least: float = -math.inf,
  above: float = -math.inf,
  most: float = math.inf,
) -> None:
  """Checks that the field `name` is finite, `>= least`, `> above` and `<= most`.

  Raises:
    ConfigError: it is not.
  """
  value = getattr(config, name)
  if math.isfinite(value) and value >= least and value > above and value <= most:
    return
  bounds = [(f">= {least}", least), (f"> {above}", above), (f"<= {most}", most)]
  expected = " and ".join(text for text, bound in bounds if math.isfinite(bound))
  raise ConfigError(f"{name}: expected a finite number {expected}, got {value}")


def check_names(config: Any, field: str, known: Collection[str]) -> None:
  """Checks that all names in the field `field` are known ones.

  Raises:
    ConfigError: one is not; the message has the nearest one.
  """
  for name in getattr(config, field):
    if name not in known:
      raise ConfigError(f"{field}: expected known names, got {name!r}{suggest(name, known)}")


class error_prefix:
  """A context that turns ValueErrors raised inside into ConfigErrors, with a field's name in
  front.
  """

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
  """The training of one network: AdamW, whose learning rate warms up linearly and decays along a
  cosine.

  Attributes:
    steps: number of optimizer steps; 0: those of `epochs`.
    epochs: in place of `steps`: passes over the examples. One of N examples has N // batch_size
      steps. `steps` holds their number when the config builds networks, objectives and optimizers.
    batch_size: rows per step, over all devices.
    learning_rate: peak of the learning rate.
    warmup_steps: steps from 0 to the peak.
    schedule_steps: step at which the decay ends; 0: the last one.
    weight_decay: AdamW's decoupled weight decay.
    microbatches: number of parts of the batch over which gradients are accumulated.
  """

  steps: int = 0
  epochs: int = 0
  batch_size: int = 64
  learning_rate: float = 1e-3
  warmup_steps: int = 0
  schedule_steps: int = 0
  weight_decay: float = 0.0
  microbatches: int = 1

  def schedule(self) -> optax.Schedule:
    """Returns the learning rate as a function of the optimizer step."""
    return optax.warmup_cosine_decay_schedule(
      0.0 if self.warmup_steps else self.learning_rate,
      self.learning_rate,
      self.warmup_steps,
      self.schedule_steps or self.steps,
    )

  def optimizer(self) -> optax.GradientTransformation:
    """Returns AdamW under the schedule."""
    return optax.adamw(self.schedule(), weight_decay=self.weight_decay)

  def logged_schedule(self) -> optax.Schedule | None:
    """Returns the schedule that `optimizer` follows; None where it does not call `schedule`."""
    schedules: list[optax.Schedule] = []

    def record() -> optax.Schedule:
      schedules.append(type(self).schedule(self))
      return schedules[0]

    copied = copy.copy(self)
    copied.schedule = record  # type: ignore[method-assign]
    copied.optimizer()
    return schedules[0] if schedules else None

  def validate(self) -> None:
    """Checks the fields.

    Raises:
      ConfigError: names the field.
    """
    self._validate_length()
    check(self, "batch_size", least=1)
    check(self, "microbatches", least=1)
    check(self, "learning_rate", above=0)
    check(self, "weight_decay", least=0)
    check(self, "schedule_steps", least=0)
    end = self.schedule_steps or self.steps
    if not 0 <= self.warmup_steps < end:
      raise ConfigError(
        f"warmup_steps: expected 0 to {end - 1} (the schedule has {end} steps), got "
        f"{self.warmup_steps}"
      )
    if end < self.steps:
      warnings.warn(
        f"schedule_steps: expected at least {self.steps} steps, got {end}: the learning rate is 0 "
        "from there on",
        stacklevel=2,
      )

  def count_steps(self, num_examples: int) -> "Training":
    """Returns a copy that has steps in place of epochs.

    Raises:
      ConfigError: a batch has more rows than there are examples.
    """
    check(self, "batch_size", least=1, most=num_examples)
    copied = copy.copy(self)
    copied.steps = self.epochs * (num_examples // self.batch_size)
    copied.epochs = 0
    return copied

  def _validate_length(self) -> None:
    check(self, "epochs", least=0)
    if not self.epochs:
      check(self, "steps", least=1)
    elif self.steps:
      raise ConfigError(
        f"epochs: expected 0 with steps={self.steps}, got {self.epochs}: set one of them to 0"
      )
    else:
      raise ConfigError(
        f"epochs: expected steps in a Training that is no field of the config, got {self.epochs} "
        "epochs: give the config a field for it"
      )


class TrainedTeacher(NamedTuple):
  """A teacher after its training, for objectives and initial weights that depend on it.

  Attributes:
    teacher: the Model.
    variables: its weights.
    train: the student's training examples (`Examples`).
  """

  teacher: Model
  variables: Variables
  train: Any


class Recipe(NamedTuple):
  """How the student of one variant is built and trained.

  Attributes:
    student: the Model that is exported, evaluated and compared.
    training: how it is trained.
    train_model: the Model that distillation trains, where it is more than the student: a cohort of
      which the student is a member, or the network from which it will be cut. None: the student.
    export_fn: returns the student's variables from `train_model`'s. None: they are the same.
    export_last: whether to export the last step's weights in place of the best evaluation's.
      Weights that are pruned during training are not pruned yet in earlier ones; without labels in
      the objective no evaluation chooses well.
    allow_shrunk: whether the exported arrays may be smaller than the student's
      (`compression.pruning.shrink`).
    teacher: 'teacher'; an earlier variant with the same seed (an assistant); or '': none.
    init_from: whose exported weights it starts from: 'baseline' or an earlier variant with the same
      seed; '': random ones.
    init_from_teacher: `(initial Variables, TrainedTeacher) -> (initial Variables, where each came
      from)`, as `compression.initialization` makes them; both are of `train_model`. None: the
      initial weights stay.
    cached: whether it reads the cache, where the config has one; otherwise its teacher is live.
    on_policy: `(student Variables, key, batch) -> batch`, as in `StepOptions`; None: the data's own
      sequences.
    relabel: `(the student's Examples, TrainedTeacher, folder) -> Examples`: those with the
      teacher's answers as labels (pseudo-labels), such as translations that `cache.seq_kd` stores.
      The folder is the run's; all seeds share it. None: their own labels.
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
  on_policy: OnPolicy | None = None
  relabel: Callable[[Any, TrainedTeacher, Path], Any] | None = None


def check_recipe(
  recipe: Recipe, earlier: Mapping[str, Recipe], training: Training, generations: int, cache: str
) -> None:
  """Checks that a recipe can be followed.

  Args:
    recipe: of one variant.
    earlier: those of the variants before it.
    training: the config's `student_training`, which was checked before.
    generations, cache: the config's fields.

  Raises:
    ConfigError: names the field.
  """
  for field, other in (("teacher", "teacher"), ("init_from", "baseline")):
    name, names = getattr(recipe, field), (other, *earlier)
    if name and name not in names:
      raise ConfigError(
        f"{field}: expected one of {names} or nothing, got {name!r}{suggest(name, names)}"
      )
  _check_shrunk(recipe, earlier, generations)
  if recipe.init_from_teacher is not None and not recipe.teacher:
    raise ConfigError("init_from_teacher: expected a teacher, got teacher='': name one")
  if recipe.teacher != "teacher" and generations > 1:
    raise ConfigError(
      f"teacher: expected 'teacher' with generations, got {recipe.teacher!r}: a later generation's "
      "teacher is the student before it"
    )
  if recipe.relabel is not None and not recipe.teacher:
    raise ConfigError("relabel: expected a teacher, got teacher='': name one")
  if cache and recipe.cached and recipe.teacher == "teacher":
    for field, rows in (("on_policy", "generated rows"), ("relabel", "rows with new labels")):
      if getattr(recipe, field) is not None:
        raise ConfigError(
          f"{field}: expected cached=False, got a cache, which has no outputs for {rows}"
        )
  if recipe.training is not training:
    with error_prefix("training"):
      recipe.training.validate()


def _check_shrunk(recipe: Recipe, earlier: Mapping[str, Recipe], generations: int) -> None:
  if recipe.teacher in earlier and earlier[recipe.teacher].allow_shrunk:
    raise ConfigError(
      f"teacher: expected a network of known shape, got {recipe.teacher!r}, which may be shrunk: "
      "choose another"
    )
  shrunk_init = recipe.init_from in earlier and earlier[recipe.init_from].allow_shrunk
  if shrunk_init and not recipe.allow_shrunk:
    raise ConfigError(
      f"allow_shrunk: expected True, got False: {recipe.init_from!r}, from whose weights it "
      "starts, may be shrunk"
    )
  if recipe.allow_shrunk and generations > 1:
    raise ConfigError(
      "allow_shrunk: expected False with generations, got True: a shrunk student cannot teach the "
      "next one"
    )
