"""Defines what a config file holds.

A config file is Python: a dataclass derived from `Config`, whose fields are plain values and whose
methods build the data, the networks and the objective *after* the overrides, and a function
`get_config()` that returns it:

    python -m distill_jax --config=configs/digits.py --config.temperature=2 --config.eval_every=50

A config may import another one of its folder (`from digits import Digits`). This module
also exports what a config needs of `recipes`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from distill_jax import objectives
from distill_jax.cache.codecs.codec import Codec
from distill_jax.cache.codecs.dense_codec import Dense
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.text.buckets import Lengths
from distill_jax.data.videos import Streamed
from distill_jax.distributed import partition, sharding
from distill_jax.errors import suggest
from distill_jax.jobs.recipes import (
  ConfigError,
  Recipe,
  TrainedTeacher,
  Training,
  check,
  check_recipe,
  error_prefix,
)
from distill_jax.train.options import Callback, StepOptions
from distill_jax.train.replay import Replay
from distill_jax.types import Batch, Model, Objective, OnPolicy, Task, Variables

Examples = Source | Streamed
"""Examples in memory; or encoded images of any size and number, or videos of any length, cropped
while training (see `Config.crops`).
"""


class Splits(NamedTuple):
  """Three disjoint sets of `Examples`: `validation` chooses; only the report reads `test`."""

  train: Any
  validation: Any
  test: Any


class Crops(NamedTuple):
  """How `Images` become arrays: `data.crops.random_resized_crop(...)` and `center_crop(...)`.

  Of `Videos`: `data.clips.random_clip(...)` and `uniform_clips(...)`.
  """

  training: Crop
  evaluation: Crop


@dataclasses.dataclass
class MeshSizes:
  """Numbers of devices along each axis of the mesh; one of them may be -1: all remaining ones.

  Attributes:
    data: axis that splits the rows of a batch.
    fsdp: axis that splits rows as well, and large arrays of the networks and the optimizer.
    tensor: axis that splits arrays of the networks, by `Config.rules` and `teacher_rules`.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass
class Config:
  """A job: derive from it, add fields, define `data`, `teacher`, `student` and `objective`.

  Attributes:
    teacher_training, student_training: how they are trained; the baseline is trained like the
      student.
    num_views: number of augmented views per example; 0: a new one each epoch.
    balance: the entry of class numbers, e.g. 'label', all of which are equally frequent in training
      (`RunOptions.balance`); empty: as frequent as in the data.
    eval_every: steps between evaluations; 0: a tenth of the steps.
    patience: number of evaluations in a row without a better `best` after which a network's
      training stops; 0: it never does.
    log_every: steps between reports.
    checkpoint_every: steps between checkpoints in addition to those at evaluations; 0: none in
      addition.
    max_skips: number of updates in a row that are not finite after which training is aborted.
    best: name of the metric that chooses the exported weights on the validation set: one of the
      task's, 'agreement' or 'teacher_kl', 'loss' or a term of the students' objective; empty: the
      task's first. Networks without a teacher are chosen by the task's first where they do not
      have it.
    devices: number of devices to use, of one process; 0: all devices of all processes.
    mesh: how they are arranged.
    teacher_seed: seed of the teacher's training; `--seeds` are the students'.
    teacher_dtype: dtype of a teacher's weights while it teaches ('bfloat16' halves the memory);
      empty: their own.
    init_from: 'baseline': a distilled student starts from the weights of the baseline with its
      seed, unless its recipe names another network; empty: from random ones.
    generations: number of students distilled one after the other. From the second on each has the
      one before it as its teacher; the last is reported (born-again networks, Furlanello et al.
      2018).
    cache: folder or URL (`gs://`, `s3://`) where the teacher's outputs are stored, and from which
      students read them, with `{workdir}` for the run's folder; empty: the teacher is live.
    cache_batch_size: rows that the teacher computes at once while it fills the cache, over all
      devices.
    reference: name of the variant whose train step's time is 1 in the report; empty: no times.
  """

  teacher_training: Training = dataclasses.field(default_factory=lambda: Training(steps=1000))
  student_training: Training = dataclasses.field(default_factory=lambda: Training(steps=1000))
  num_views: int = 0
  balance: str = ""
  eval_every: int = 0
  patience: int = 0
  log_every: int = 50
  checkpoint_every: int = 0
  max_skips: int = 10
  best: str = ""
  devices: int = 0
  mesh: MeshSizes = dataclasses.field(default_factory=MeshSizes)
  teacher_seed: int = 0
  teacher_dtype: str = ""
  init_from: str = ""
  generations: int = 1
  cache: str = ""
  cache_batch_size: int = 256
  reference: str = ""

  def data(self) -> Splits:
    """Returns the training, validation and test sets."""
    raise _undefined(self, "data")

  def task(self) -> Task | None:
    """Returns what is measured in training and in the report; None: the task that outputs and
    labels fit (`tasks.infer`), or the objective's own terms.
    """
    return None

  def crops(self) -> Crops:
    """Returns how images are cropped where `data` returns `Images` or `Videos`."""
    raise ConfigError(
      "crops: expected crops for the images that data() returns, got none: define "
      "crops(), such as Crops(random_resized_crop(224, seed=0), center_crop(224)), of videos "
      "Crops(random_clip(16, seed=0), uniform_clips(16))"
    )

  def lengths(self) -> Lengths:
    """Returns the numbers of tokens of training batches of texts, or of pairs of them, which have
    little padding then (`data.text.LengthBuckets`); (): all batches have the rows' length.
    """
    return ()

  def teacher_train(self, train: Examples) -> Examples:
    """Returns what the teacher trains on: `train` or a part of it, or any other examples."""
    return train

  def student_train(self, train: Examples) -> Examples:
    """Returns what the student is distilled on; few of them may have labels, or none (a transfer
    set).
    """
    return train

  def baseline_train(self, train: Examples) -> Examples:
    """Returns what the baseline is trained on; some of them must have labels."""
    return self.student_train(train)

  def teacher(self) -> Model | None:
    """Returns the teacher; None where there is none, as where students teach one another."""
    raise _undefined(self, "teacher")

  def student(self) -> Model:
    """Returns the network of the baseline, which distillation trains too where no `recipe` names
    another.
    """
    raise _undefined(self, "student")

  def objective(self) -> Objective:
    """Returns what the distilled student minimizes."""
    raise _undefined(self, "objective")

  def cached_outputs(self) -> Mapping[str, Codec]:
    """Returns the codec of each teacher output that a cache stores, by name."""
    return {"logits": Dense("float16")}

  def rules(self, role: str) -> partition.Rules:
    """Returns the rules that place the trained network's arrays on the mesh; (): the default.

    Args:
      role: 'teacher', 'baseline' or 'student'.
    """
    del role
    return ()

  def teacher_rules(self) -> partition.Rules:
    """Returns the rules that place the teacher's arrays while it teaches; (): the default."""
    return ()

  def variants(self) -> Sequence[str]:
    """Returns the names of the distilled students of one run, one per objective; a single one has
    no name.
    """
    return ("",)

  def recipe(self, variant: str) -> Recipe:
    """Returns how the student of this name is built and trained:
    `super().recipe(variant)._replace(...)`.
    """
    del variant
    return Recipe(self.student(), self.student_training, init_from=self.init_from)

  def variant_objective(
    self, variant: str, trained_teacher: TrainedTeacher | None = None
  ) -> Objective:
    """Returns what the student of this name minimizes.

    Args:
      variant: one of `variants`.
      trained_teacher: the trained teacher and the student's examples, for what needs them (OFD's
        margins, a paraphraser). None where the config is checked and described: values may then
        differ, but not shapes.
    """
    del variant, trained_teacher
    return self.objective()

  def report_text(self, model: Model, variables: Variables) -> str:
    """Returns what the report prints for a network, such as text that it generates; empty:
    nothing.
    """
    del model, variables
    return ""

  def baseline_objective(self) -> Objective:
    """Returns what the teacher and the baseline minimize."""
    return objectives.weighted(hard=(1.0, objectives.labels()))

  def augment(self) -> Callable[[Batch], Batch] | None:
    """Returns the augmentation, a function of (seed, id, view), the same for teacher and student;
    None: none.
    """
    return None

  def mix(self) -> Callable[[jax.Array, Batch], Batch] | None:
    """Returns mixup or cutmix; None: neither."""
    return None

  def step_options(
    self, training: Training, on_policy: OnPolicy | Replay | None = None
  ) -> StepOptions:
    """Returns the options of a network's train step."""
    return StepOptions(
      augment=self.augment(),
      mix=self.mix(),
      on_policy=on_policy,
      microbatches=training.microbatches,
    )

  def callbacks(self, network: str) -> Sequence[Callback]:
    """Returns functions that are called with what a network's training reports, such as a logger's
    (`RunOptions.callbacks`).

    Args:
      network: its name, such as 'student-0'.
    """
    del network
    return ()

  def make_mesh(self) -> jax.sharding.Mesh:
    """Returns the mesh of `devices` and `mesh`.

    Raises:
      ConfigError: there are fewer devices, or the sizes do not fit them.
    """
    devices = jax.devices()
    if self.devices and (jax.process_count() > 1 or self.devices > len(devices)):
      wanted = (
        "0, all of all processes"
        if jax.process_count() > 1
        else f"1 to {len(devices)}, or 0 for all"
      )
      raise ConfigError(
        f"devices: expected {wanted} ({devices[0].device_kind}), got {self.devices}"
      )
    try:
      sizes = dataclasses.astuple(self.mesh)
      return sharding.make_mesh(*sizes, devices=devices[: self.devices or None])
    except ValueError as error:
      raise ConfigError(str(error)) from error

  def validate(self) -> None:
    """Checks values that cannot be run; a config with more fields extends it.

    Raises:
      ConfigError: names the field.
    """
    least_0 = "num_views eval_every patience checkpoint_every devices teacher_seed"
    for name in least_0.split():
      check(self, name, least=0)
    for name in ("log_every", "max_skips", "generations"):
      check(self, name, least=1)
    self._validate_variants()
    self._validate_cache()
    if self.init_from not in ("", "baseline"):
      raise ConfigError(f"init_from: expected 'baseline' or nothing, got {self.init_from!r}")
    if self.teacher_dtype not in ("", "bfloat16", "float16", "float32"):
      raise ConfigError(
        "teacher_dtype: expected 'bfloat16', 'float16', 'float32' or nothing, got "
        f"{self.teacher_dtype!r}"
      )
    for name in ("teacher_training", "student_training"):
      with error_prefix(name):
        getattr(self, name).validate()

  def _validate_cache(self) -> None:
    check(self, "cache_batch_size", least=1)
    if not self.cache:
      return
    if self.mix() is not None:
      raise ConfigError(
        "cache: expected none with mix(), which makes new examples in every batch, got "
        f"{self.cache!r}: leave it empty"
      )
    if self.lengths():
      raise ConfigError(
        "cache: expected none with lengths(), as it stores the outputs of full rows, got "
        f"{self.cache!r}: leave it empty"
      )
    has_crops = type(self).crops is not Config.crops  # Their views are checked with the cache.
    if self.augment() is None and not has_crops and self.num_views > 1:
      raise ConfigError(
        f"num_views: expected 1 (or 0) without augmentation and crops, got {self.num_views}: all "
        "views would be equal"
      )
    if self.generations > 1 and not all(
      isinstance(codec, Dense) for codec in self.cached_outputs().values()
    ):
      raise ConfigError(
        f"generations: expected 1 with a cache that is not dense, got {self.generations}: later "
        "ones have live teachers"
      )

  def _validate_variants(self) -> None:
    variants = tuple(self.variants())
    for name in variants:
      if name in ("teacher", "baseline"):
        raise ConfigError(
          f"variants: expected names of distilled students, got {name!r}, which is a role: choose "
          "another name"
        )
      if variants != ("",) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,23}", name):
        raise ConfigError(
          f"variants: expected names of 1 to 24 letters, digits, '_', '.' and '+', got {name!r}: "
          "they name folders"
        )
    if not variants or len(set(variants)) < len(variants):
      raise ConfigError(f"variants: expected different names, at least one, got {variants}")
    if self.generations > 1 and variants != ("",):
      raise ConfigError(
        f"generations: expected 1 with the variants {variants}, got {self.generations}: each "
        "generation has one teacher"
      )
    if self.reference and self.reference not in variants:
      raise ConfigError(
        f"reference: expected a variant, got {self.reference!r}{suggest(self.reference, variants)}"
      )

  def recipes(self) -> dict[str, Recipe]:
    """Returns the recipe of each variant.

    Raises:
      ConfigError: one cannot be followed; the variant and the field are named.
    """
    recipes: dict[str, Recipe] = {}
    for variant in self.variants():
      with error_prefix(f"recipe of {variant!r}" if variant else "recipe"):
        recipe = self.recipe(variant)
        check_recipe(recipe, recipes, self.student_training, self.generations, self.cache)
        recipes[variant] = recipe
    if self.cache and not any(recipe.cached for recipe in recipes.values()):
      raise ConfigError(
        f"cache: expected a recipe that reads it, got cached=False in all of {list(recipes)}: "
        "leave cache empty"
      )
    return recipes


def check_config(config: Config) -> None:
  """Checks a config as a whole: its values, and that its objectives can be built.

  Raises:
    ConfigError: names the field.
  """
  config.validate()
  for variant in config.variants():
    with error_prefix(f"objective of {variant!r}" if variant else "objective"):
      config.variant_objective(variant)


def _undefined(config: Config, method: str) -> ConfigError:
  returns = {
    "data": "data.Splits(train, validation, test)",
    "teacher": "a Model, or None",
    "student": "a Model",
    "objective": "objectives.weighted(...)",
  }[method]
  return ConfigError(
    f"{method}: expected {type(config).__name__} to define it, got none: write "
    f"def {method}(self), which returns {returns}"
  )
