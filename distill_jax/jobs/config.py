"""What a config file holds.

A config file is Python: a dataclass derived from `Config`, whose fields are plain values and whose methods build
the data, the networks and the objective *after* the overrides, and a function `get_config()` that returns it:

    python -m distill_jax --config=configs/digits.py --config.temperature=2 --config.student_training.steps=500

A config may import one that lies beside it (`from digits import Digits`). It must not say
`from __future__ import annotations`: overrides need the fields' types. What it needs of `recipes` is found here too.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from distill_jax import objectives
from distill_jax.cache.codecs.dense import Codec, Dense
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.distributed import sharding
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
from distill_jax.types import Batch, Model, Objective, Variables

SCORES = (
  "accuracy",
  "top5",
  "nll",
  "precision",
  "recall",
  "f1",
  "ece",
  "perplexity",
)  # of an evaluation, see `metrics.summary`


Examples = Source | Images
"""In memory; or encoded, of any size and number, and read while training (`Config.crops` says how)."""


class Splits(NamedTuple):
  """Three disjoint sets, each `Examples`: `validation` chooses, `test` is read by the report alone."""

  train: Any
  validation: Any
  test: Any


class Crops(NamedTuple):
  """How `Images` become arrays: `data.crops.random_resized_crop(...)` and `center_crop(...)`."""

  training: Crop
  evaluation: Crop


@dataclasses.dataclass
class MeshSizes:
  """Devices along each axis of the mesh; one of them may be -1: what is left.

  Attributes:
    data: rows of a batch are spread over it.
    fsdp: rows as well, and large arrays of the networks and the optimizer.
    tensor: arrays of the networks, by `Config.rules` and `teacher_rules`.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass
class Config:
  """A job: derive from it, add fields, define `data`, `teacher`, `student` and `objective`.

  Attributes:
    teacher_training, student_training: how they are trained; the baseline is trained like the student.
    num_views: different augmented views per example; 0: a new one each epoch.
    eval_every: steps between evaluations; 0: a tenth of the steps.
    log_every: steps between reports.
    checkpoint_every: steps between checkpoints besides those at evaluations; 0: none besides.
    max_skips: abort after so many updates in a row that were not finite.
    best: the validation score that chooses the exported weights, and 'max' or 'min'.
    devices: how many devices to use, of one process; 0: all of all processes.
    mesh: how they are arranged.
    teacher_seed: of the teacher's training; `--seeds` are the students'.
    teacher_dtype: what a teacher's weights are kept in while it teaches: 'bfloat16', half the memory; empty: as they
      are.
    init_from: 'baseline': a distilled student starts from the weights of the one trained alone with its seed, where its
      recipe names no other; empty: from random ones.
    generations: students distilled one after the other; from the second on each has the one before it as its
      teacher, and the last is the one reported (born-again networks, Furlanello et al. 2018).
    cache: folder or URL (`gs://`, `s3://`) where the teacher's outputs are kept, and the students read them. Empty:
      the teacher is live.
    cache_batch_size: rows that the teacher takes at once while it fills the cache, over all devices.
    reference: the variant with whose train step the report compares the others' in time; empty: it does not.
  """

  teacher_training: Training = dataclasses.field(default_factory=Training)
  student_training: Training = dataclasses.field(default_factory=Training)
  num_views: int = 0
  eval_every: int = 0
  log_every: int = 50
  checkpoint_every: int = 0
  max_skips: int = 10
  best: tuple[str, str] = ("accuracy", "max")
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
    raise NotImplementedError

  def crops(self) -> Crops:
    """How the images are cut where `data` gives `Images`."""
    raise ConfigError(
      "crops: data() gives images to be read while training, and the config does not say how they are cut: define "
      "crops(), such as Crops(random_resized_crop(224, seed=0), center_crop(224))"
    )

  def teacher_train(self, train: Examples) -> Examples:
    """What the teacher trains on: `train` or a part of it, or any other examples."""
    return train

  def student_train(self, train: Examples) -> Examples:
    """What the student is distilled on; the labels may be few, or none (a transfer set)."""
    return train

  def baseline_train(self, train: Examples) -> Examples:
    """What the student alone is trained on, the labeled examples at least in part."""
    return self.student_train(train)

  def teacher(self) -> Model | None:
    """None: there is no teacher, as where students teach one another."""
    raise NotImplementedError

  def student(self) -> Model:
    """The network that the baseline trains alone, and that distillation trains where no `recipe` says otherwise."""
    raise NotImplementedError

  def objective(self) -> Objective:
    """What the distilled student minimizes."""
    raise NotImplementedError

  def cached_outputs(self) -> Mapping[str, Codec]:
    """Which outputs of the teacher a cache keeps, and how."""
    return {"logits": Dense("float16")}

  def rules(self, role: str) -> sharding.Rules:
    """Where the arrays of the network that is trained lie on the mesh, where the default does not suit it.

    Args:
      role: 'teacher', 'baseline' or 'student'.
    """
    del role
    return ()

  def teacher_rules(self) -> sharding.Rules:
    """The same of the teacher, while it teaches."""
    return ()

  def variants(self) -> Sequence[str]:
    """Names of the distilled students of one run, which differ in their objectives; one without a name."""
    return ("",)

  def recipe(self, variant: str) -> Recipe:
    """How the student of this name comes about: `super().recipe(variant)._replace(...)`."""
    del variant
    return Recipe(self.student(), self.student_training, init_from=self.init_from)

  def variant_objective(
    self, variant: str, trained_teacher: TrainedTeacher | None = None
  ) -> Objective:
    """What the student of this name minimizes.

    Args:
      variant: one of `variants`.
      trained_teacher: the trained teacher and the student's examples, for what needs them: OFD's margins, a paraphraser. None
        where the config is checked and described: then numbers may be others, but not shapes.
    """
    del variant, trained_teacher
    return self.objective()

  def shown(self, model: Model, variables: Variables) -> str:
    """What the report prints of a network beside its scores, such as text that it writes; empty: nothing."""
    del model, variables
    return ""

  def baseline_objective(self) -> Objective:
    """What the teacher, and the student trained alone, minimize."""
    return objectives.weighted(hard=(1.0, objectives.labels()))

  def augment(self) -> Callable[[Batch], Batch] | None:
    """Augmentation by (seed, id, view), the same for teacher and student; None: none."""
    return None

  def mix(self) -> Callable[[jax.Array, Batch], Batch] | None:
    """Mixup or cutmix; None: none."""
    return None

  def make_mesh(self) -> jax.sharding.Mesh:
    """The mesh of `devices` and `mesh`.

    Raises:
      ConfigError: there are not so many devices, or the sizes do not fit them.
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
    """Raises a ConfigError for values that cannot be run; a config with more fields extends it."""
    for name in ("num_views", "eval_every", "checkpoint_every", "devices", "teacher_seed"):
      check(self, name, least=0)
    for name in ("log_every", "max_skips", "generations"):
      check(self, name, least=1)
    self._validate_variants()
    self._validate_cache()
    if self.init_from not in ("", "baseline"):
      raise ConfigError(f"init_from: expected 'baseline' or nothing, got {self.init_from!r}")
    if self.teacher_dtype not in ("", "bfloat16", "float16", "float32"):
      raise ConfigError(
        f"teacher_dtype: expected 'bfloat16', 'float16', 'float32' or nothing, got {self.teacher_dtype!r}"
      )
    if self.best[1] not in ("max", "min"):
      raise ConfigError(f"best: expected a score and 'max' or 'min', got {self.best}")
    if self.best[0] not in SCORES:
      raise ConfigError(f"best: there is no score {self.best[0]!r}{suggest(self.best[0], SCORES)}")
    for name in ("teacher_training", "student_training"):
      with error_prefix(name):
        getattr(self, name).validate()

  def _validate_cache(self) -> None:
    check(self, "cache_batch_size", least=1)
    if not self.cache:
      return
    if self.mix() is not None:
      raise ConfigError(
        "cache: expected none: mix() makes a new example in every batch, and no cache holds it"
      )
    if self.augment() is None and self.num_views > 1:
      raise ConfigError(
        f"num_views: expected 1 (or 0) without augmentation, got {self.num_views}: all views would be one"
      )
    if self.generations > 1 and not all(
      isinstance(codec, Dense) for codec in self.cached_outputs().values()
    ):
      raise ConfigError(
        "generations: expected 1: only the first generation reads the cache, and it keeps no dense logits"
      )
    if self.augment() is not None and self.num_views == 0:
      raise ConfigError(
        "num_views: expected at least 1, got 0 (a new view each epoch): a cache holds a number of views of each example"
      )

  def _validate_variants(self) -> None:
    variants = tuple(self.variants())
    for name in variants:
      if name in ("teacher", "baseline"):
        raise ConfigError(
          f"variants: expected names of distilled students, got {name!r}: it names another role"
        )
      if variants != ("",) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,23}", name):
        raise ConfigError(
          f"variants: expected names of 1 to 24 letters, digits, '_', '.' and '+', got {name!r}: they name folders"
        )
    if not variants or len(set(variants)) < len(variants):
      raise ConfigError(f"variants: expected different names, at least one, got {variants}")
    if self.generations > 1 and variants != ("",):
      raise ConfigError(
        f"generations: expected 1, got {self.generations}: there are variants {variants}, and a generation has one "
        "teacher"
      )
    if self.reference and self.reference not in variants:
      raise ConfigError(
        f"reference: there is no variant {self.reference!r}{suggest(self.reference, variants)}"
      )

  def recipes(self) -> dict[str, Recipe]:
    """The recipe of each variant.

    Raises:
      ConfigError: one that cannot be followed; the variant and the field are named.
    """
    found: dict[str, Recipe] = {}
    for variant in self.variants():
      with error_prefix(f"recipe of {variant!r}" if variant else "recipe"):
        recipe = self.recipe(variant)
        check_recipe(recipe, found, self.student_training, self.generations, self.cache)
        found[variant] = recipe
    if self.cache and not any(recipe.cached for recipe in found.values()):
      raise ConfigError("cache: expected none: no variant's recipe reads it")
    return found
