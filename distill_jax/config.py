"""What a config file holds, and how it is read.

A config file is Python: a dataclass derived from `Config`, whose fields are plain values and whose methods build
the data, the networks and the objective *after* the overrides, and a function `get_config()` that returns it:

    python -m distill_jax --config=configs/digits.py --config.temperature=2 --config.student_training.steps=500

A config may import one that lies beside it (`from digits import Digits`). It must not say
`from __future__ import annotations`: overrides need the fields' types.
"""

import dataclasses
import difflib
import importlib.util
import math
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from absl import flags
from ml_collections import config_flags

from distill_jax import objectives
from distill_jax.data import Source
from distill_jax.errors import suggest
from distill_jax.types import Batch, Model, Objective, Variables

SCORES = (
  "accuracy",
  "top5",
  "nll",
  "precision",
  "recall",
  "f1",
  "ece",
)  # of an evaluation, see `metrics.summary`


class ConfigError(ValueError):
  """A config that cannot be run; the message names the field, what it got and what it expected."""


class Splits(NamedTuple):
  """Three disjoint sets: `validation` chooses, `test` is read by the report alone."""

  train: Source
  validation: Source
  test: Source


@dataclasses.dataclass
class Training:
  """How one network is trained: AdamW under a learning rate that warms up linearly and decays along a cosine.

  Attributes:
    steps: optimiser steps.
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
    """The learning rate as a function of the optimiser step."""
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


@dataclasses.dataclass
class Config:
  """A job: derive from it, add fields, define `data`, `teacher`, `student` and `objective`.

  Attributes:
    teacher_training, student_training: how they are trained; the baseline is trained like the student.
    views: different augmented views per example; 0: a new one each epoch.
    eval_every: steps between evaluations; 0: a tenth of the steps.
    log_every: steps between reports.
    checkpoint_every: steps between checkpoints besides those at evaluations; 0: none besides.
    max_skips: abort after so many updates in a row that were not finite.
    best: the validation score that chooses the exported weights, and 'max' or 'min'.
    devices: how many local devices to use; 0: all.
    teacher_seed: of the teacher's training; `--seeds` are the students'.
    init_from: 'baseline': a distilled student starts from the weights of the one trained alone with its seed;
      empty: from random ones.
    generations: students distilled one after the other; from the second on each has the one before it as its
      teacher, and the last is the one reported (born-again networks, Furlanello et al. 2018).
  """

  teacher_training: Training = dataclasses.field(default_factory=Training)
  student_training: Training = dataclasses.field(default_factory=Training)
  views: int = 0
  eval_every: int = 0
  log_every: int = 50
  checkpoint_every: int = 0
  max_skips: int = 10
  best: tuple[str, str] = ("accuracy", "max")
  devices: int = 0
  teacher_seed: int = 0
  init_from: str = ""
  generations: int = 1

  def data(self) -> Splits:
    raise NotImplementedError

  def teacher_train(self, train: Source) -> Source:
    """What the teacher trains on: `train` or a part of it, or any other examples."""
    return train

  def student_train(self, train: Source) -> Source:
    """What the student is distilled on; the labels may be few, or none (a transfer set)."""
    return train

  def baseline_train(self, train: Source) -> Source:
    """What the student alone is trained on, the labelled examples at least in part."""
    return self.student_train(train)

  def teacher(self) -> Model | None:
    """None: there is no teacher, as where students teach one another."""
    raise NotImplementedError

  def student(self) -> Model:
    """The one network that is exported, evaluated and compared, and that the baseline trains alone."""
    raise NotImplementedError

  def learner(self) -> Model:
    """What distillation trains: the student, or more than it, such as the cohort that it is a member of."""
    return self.student()

  def exported(self, learned: Variables) -> Variables:
    """The student's weights out of the learner's."""
    return learned

  def objective(self) -> Objective:
    """What the distilled student minimises."""
    raise NotImplementedError

  def plain_objective(self) -> Objective:
    """What the teacher, and the student trained alone, minimise."""
    return objectives.weighted(hard=(1.0, objectives.labels()))

  def augment(self) -> Callable[[Batch], Batch] | None:
    """Augmentation by (seed, id, view), the same for teacher and student; None: none."""
    return None

  def mix(self) -> Callable[[jax.Array, Batch], Batch] | None:
    """Mixup or cutmix; None: none."""
    return None

  def validate(self) -> None:
    """Raises a ConfigError for values that cannot be run; a config with more fields extends it."""
    for name in ("views", "eval_every", "checkpoint_every", "devices", "teacher_seed"):
      check(self, name, least=0)
    for name in ("log_every", "max_skips", "generations"):
      check(self, name, least=1)
    if self.init_from not in ("", "baseline"):
      raise ConfigError(f"init_from: expected 'baseline' or nothing, got {self.init_from!r}")
    if self.best[1] not in ("max", "min"):
      raise ConfigError(f"best: expected a score and 'max' or 'min', got {self.best}")
    if self.best[0] not in SCORES:
      raise ConfigError(f"best: there is no score {self.best[0]!r}{suggest(self.best[0], SCORES)}")
    for name in ("teacher_training", "student_training"):
      with prefixed(name):
        getattr(self, name).validate()


def check(
  config: Any, name: str, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
  """Raises a ConfigError unless the field `name` is finite, `>= least`, `> above` and `<= most`."""
  value = getattr(config, name)
  if math.isfinite(value) and value >= least and value > above and value <= most:
    return
  bounds = [(f">= {least}", least), (f"> {above}", above), (f"<= {most}", most)]
  wanted = " and ".join(text for text, bound in bounds if math.isfinite(bound))
  raise ConfigError(f"{name}: expected a finite number {wanted}, got {value}")


class prefixed:
  """Puts a field's name in front of ConfigErrors, and makes ConfigErrors of ValueErrors, raised inside."""

  def __init__(self, name: str):
    self.name = name

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if kind is not None and issubclass(kind, ValueError):
      separator = "." if issubclass(kind, ConfigError) else ": "
      raise ConfigError(f"{self.name}{separator}{error}") from error


def load(path: str, overrides: Sequence[str] = ()) -> Config:
  """The config of a file with overrides, checked as a whole.

  Args:
    path: the file; it defines `get_config()`.
    overrides: `field=value` or `nested.field=value`.

  Raises:
    ConfigError: no such file, no such field (the nearest is named), a value of another type or outside its range.
  """
  if not Path(path).is_file():
    near = difflib.get_close_matches(Path(path).name, [p.name for p in Path(path).parent.glob("*.py")], n=1)
    hint = f"; did you mean {Path(path).parent / near[0]}?" if near else ""
    raise ConfigError(f"--config: there is no file {path}{hint}")
  config = _read(path)
  for override in overrides:
    _check_name(config, override.partition("=")[0])
  config = _override(config, [f"--config.{override}" for override in overrides])
  _check_types(config, "")
  config.validate()
  with prefixed("objective"):
    config.objective()
  return config


def settings(config: Any) -> dict[str, Any]:
  """All fields as plain values that json can hold, nested dataclasses as dicts."""
  return _plain(dataclasses.asdict(config))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
  """Lines `field: old -> new` for the fields in which two settings differ."""
  lines = []
  for name in sorted({*old, *new}):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f"{prefix}{name}.")
    elif a != b:
      lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
  return lines


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _read(path: str) -> Config:
  spec: Any = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up
  sys.path.insert(0, str(Path(path).resolve().parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
    del sys.modules[spec.name]
  if not hasattr(module, "get_config"):
    raise ConfigError(f"{path} defines no get_config()")
  config = module.get_config()
  if not isinstance(config, Config):
    raise ConfigError(
      f"{path}: get_config() must return a distill_jax.config.Config, got {type(config).__name__}"
    )
  return config


def _override(config: Config, arguments: list[str]) -> Config:
  values, argv = flags.FlagValues(), ["distill-jax", *arguments]
  config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
  try:
    values(argv)
    return values.config
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(str(error).strip().partition("\n")[0] or type(error).__name__) from error


def _check_name(config: Any, dotted: str) -> None:
  known = list(_paths(config, ""))
  if dotted in known:
    return
  same_end = [path for path in known if path.rpartition(".")[2] == dotted.rpartition(".")[2]]
  near = same_end or difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
  hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {known}"
  raise ConfigError(f"--config.{dotted}: there is no such field; {hint}")


def _paths(config: Any, prefix: str) -> Iterator[str]:
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _paths(value, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}"


def _check_types(config: Any, prefix: str) -> None:
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, hint = getattr(config, field.name), hints[field.name]
    if dataclasses.is_dataclass(value):
      _check_types(value, f"{prefix}{field.name}.")
    elif not _fits(value, hint):
      raise ConfigError(f"{prefix}{field.name}: expected {_name(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, option) for option in arguments)
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    if len(arguments) == 2 and arguments[1] is Ellipsis:
      return all(_fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(map(_fits, value, arguments))
  if hint is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, hint)


def _name(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
