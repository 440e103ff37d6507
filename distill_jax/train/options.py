"""Options of a train step and of a training run, grouped by what they are about."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from distill_jax.data import Source
from distill_jax.data.batch_functions import (
  check_augment,
  check_mix,
  describe_function,
  takes_arguments,
)
from distill_jax.distributed.partition import Rules
from distill_jax.errors import check_integer
from distill_jax.objectives.class_labels import check_ignore_label
from distill_jax.storage import folders
from distill_jax.train.replay import Replay
from distill_jax.types import Batch, OnPolicy, Outputs

Batches = Source | Iterable[Mapping[str, Any]]
"""Examples in memory, or batches that can be iterated again and again."""

Callback = Callable[[int, Mapping[str, float]], None]
"""A function of a step and of what was measured then; see `RunOptions.callbacks`."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """What a train step does in addition to its forward and backward passes.

  Attributes:
    augment: `batch -> batch`, a function of ids and views (`data.augmentation`). It runs first, so
      that teacher and student see the same view.
    mix: `(key, batch) -> batch` mixes rows (`data.mixup`). It runs after `augment`.
    on_policy: `(student Variables, key, batch) -> batch` replaces some rows by sequences that the
      student generates (`models.llm.on_policy.generate_on_policy`,
      `models.decoding.sample_on_policy`), for the teacher to score. It runs on the full batch,
      after `mix`, and is not differentiated. The key is the same on all devices: rows differ by
      their ids. Or a `Replay`.
    microbatches: number of equal parts of the batch over which gradients are accumulated. Each
      term's denominator is that of the full batch, so the result equals one large step's. Batch
      norm and losses that relate rows see one part.
    metrics: `(student Outputs, batch) -> {name: (sum, count)}`, metrics of training
      (`Task.train_metrics`); None: none.
    axis_name: the mapped axis under `pmap` or `shard_map`. The batch is then one device's part, and
      the result equals the jitted step's on the full batch, for networks without batch norm or
      whose batch norm has the axis name. Leave it None under `jit` over a mesh.

  Raises:
    ValueError: fewer than one microbatch, or a `Replay` under a mapped axis, where its buffer is
      not shared.

  >>> from distill_jax import data
  >>> from distill_jax.train import StepOptions
  >>> StepOptions(augment=data.augmentation(data.flip(), seed=0), microbatches=2).microbatches
  2
  """

  augment: Callable[[Batch], Batch] | None = None
  mix: Callable[[jax.Array, Batch], Batch] | None = None
  on_policy: OnPolicy | Replay | None = None
  microbatches: int = 1
  metrics: Callable[[Outputs, Batch], Mapping[str, Any]] | None = None
  axis_name: str | None = None

  def __post_init__(self):
    _check_least(self, 1, "microbatches")
    check_augment(self.augment)
    check_mix(self.mix)
    _check_functions(self, "metrics")
    if self.on_policy is not None and not isinstance(self.on_policy, Replay):
      _check_functions(self, "on_policy")
    if isinstance(self.on_policy, Replay) and self.axis_name is not None:
      raise ValueError(
        f"on_policy: expected no Replay under axis_name {self.axis_name!r}, where its buffer is "
        "not shared: jit over a mesh"
      )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """On what, how often and by which metric a student is evaluated while it trains.

  Attributes:
    data: validation examples, never trained on; or batches that can be iterated again and again,
      the last one filled up under 'where' (`data.stream.EvalStream`).
    every: steps between evaluations; None: a tenth of all steps. The last step is always evaluated.
    best: the metric that chooses the returned variables: the task's, 'loss' or a term of the
      objective; None: the task's first. The validation 'loss' and its terms are measured next to
      the task wherever the objective can be computed: not with a cached teacher, whose outputs the
      examples lack, nor with terms that keep a state, such as memory banks.
    patience: number of evaluations in a row without a better `best` after which training stops;
      None: it never does. Only a higher (or lower) score is better, not a lower loss at an equal
      one. The count is stored with each checkpoint, and `FitResult.stop_reason` tells the reason.

  Raises:
    ValueError: `every` or `patience` is less than 1, or `data` is an iterator.

  >>> import numpy as np
  >>> from distill_jax.train import Evaluation
  >>> validation = [{"x": np.zeros((8, 2), np.float32), "label": np.zeros(8, int)}]
  >>> Evaluation(validation, every=100, best="accuracy", patience=5).every
  100
  """

  data: Batches
  every: int | None = None
  best: str | None = None
  patience: int | None = None

  def __post_init__(self):
    _check_least(self, 1, "every", "patience")
    check_kind("best", self.best, (str, type(None)), "the name of a metric or None")
    if isinstance(self.data, Iterator) and not hasattr(self.data, "set_state"):
      raise ValueError(
        "evaluation: expected batches that can be iterated again and again, got an iterator, which "
        "is empty after the first evaluation: pass a list or a Source"
      )


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
  """Where and how often a run is saved, and by what it is recognized when it resumes.

  Attributes:
    folder: for checkpoints, metrics.jsonl, timings.jsonl and TensorBoard files; the same one for
      all processes.
    every: steps between checkpoints in addition to those at evaluations; None: none in addition.
    identity: what must be equal for a run to resume, in addition to the data, seed, views, batch
      size, teacher, and the names of the terms and of the optimizer's parts. Their
      hyper-parameters may change, with a warning; networks are compared by their arrays, and a
      pipeline of your own by its name: put what else matters here (a hash of your config).

  Raises:
    ValueError: `every` is less than 1, or there is no folder, or it is a URL.

  >>> from distill_jax.train import CheckpointOptions
  >>> CheckpointOptions("runs/student", every=100).every
  100
  """

  folder: str | Path
  every: int | None = None
  identity: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    _check_least(self, 1, "every")
    if not isinstance(self.folder, (str, os.PathLike)) or not os.fspath(self.folder):
      raise ValueError(
        f"checkpoints: expected a folder or CheckpointOptions, got {self.folder!r}: name a folder "
        "such as 'runs/first'"
      )
    folders.resolve_run(self.folder, "checkpoints")
    check_kind("identity", self.identity, (Mapping,), "a mapping such as {'learning_rate': 1e-3}")


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """How a run reads its data, where its arrays are, and what it reports.

  Attributes:
    num_views: number of augmented views per example; 0: a new one each epoch.
    balance: the entry of class numbers, e.g. 'label', all of which are equally frequent in an epoch
      of a `Source` (`data.batches`); None: as frequent as in the source. `objectives.labels` takes
      class weights instead. The validation set keeps its frequencies.
    ignore_label: the label that marks examples without one in a pipeline of your own (a `Source`
      knows its own); `objectives.labels(ignore_label=...)` or a task's is enough.
    mesh: `sharding.make_mesh(...)`; None: all devices along `data`.
    rules: places arrays of the train state on the mesh. Without a rule large arrays are split over
      `fsdp`, and all others are on every device.
    teacher_rules: the same for a live teacher's arrays.
    learning_rate: schedule of the optimizer (`number of updates -> rate`) or its constant rate, for
      the log. A rate in the optimizer's state (`optax.inject_hyperparams`) is logged without it.
      None: no other is logged, since an optimizer does not tell it.
    log_every: steps between reports; metrics stay on the device until then. There is one before
      each evaluation too.
    max_skips: number of updates in a row that were not finite after which training is aborted.
    profile_steps: numbers of the steps to be traced into the folder's `profile`, for xprof; None:
      none.
    callbacks: functions `(step, scores) -> None`, called on the first process at each report of
      training and after each evaluation. `scores` are the line of metrics.jsonl, by names such as
      'train/loss' and 'validation/accuracy'. What one raises ends the run. A run that was killed
      reports the steps after its last checkpoint again when it resumes. To Weights & Biases, with
      `google-metrax` and `wandb`:

          logger = metrax.logging.WandbBackend("project")  # or TensorboardBackend("folder")
          def log(step, scores):
            for name, value in scores.items():
              logger.log_scalar(name, value, step=step)

          fit(..., run=RunOptions(callbacks=[log]))

    title: of the progress bar.
    progress: whether to show a progress bar on a terminal, and a line per evaluation elsewhere.

  Raises:
    ValueError: `log_every` or `max_skips` is less than 1, or `num_views` less than 0, or a callback
      or schedule does not take these arguments.

  >>> from distill_jax.train import RunOptions
  >>> RunOptions(title="student", num_views=8).num_views
  8
  """

  num_views: int = 0
  balance: str | None = None
  ignore_label: int | None = None
  mesh: jax.sharding.Mesh | None = None
  rules: Rules = ()
  teacher_rules: Rules = ()
  learning_rate: Callable[[Any], Any] | float | None = None
  log_every: int = 50
  max_skips: int = 10
  profile_steps: range | None = None
  callbacks: Sequence[Callback] = ()
  title: str = "train"
  progress: bool = True

  def __post_init__(self):
    _check_least(self, 1, "log_every", "max_skips")
    _check_least(self, 0, "num_views")
    check_ignore_label(self.ignore_label)
    _check_callbacks(self.callbacks)
    if not takes_arguments(self.learning_rate, 1):
      expected = "a schedule of optax, a number or None"
      check_kind("learning_rate", self.learning_rate, (float, int, type(None)), expected)
    check_kind("balance", self.balance, (str, type(None)), "the name of an entry or None")
    check_kind(
      "mesh",
      self.mesh,
      (jax.sharding.Mesh, type(None)),
      "a Mesh of sharding.make_mesh(...) or None",
    )


def check_kind(name: str, value: Any, kinds: tuple[type, ...], expected: str) -> None:
  """Checks that a value is of one of the types.

  Raises:
    ValueError: it is not; the message says what is `expected`.
  """
  if isinstance(value, kinds):
    return
  got = value.__name__ if inspect.isroutine(value) or isinstance(value, type) else repr(value)
  raise ValueError(f"{name}: expected {expected}, got {got[:100]}")


def _check_callbacks(callbacks: Any) -> None:
  check_kind("callbacks", callbacks, (list, tuple), "a list of functions (step, scores) -> None")
  for function in callbacks:
    if not takes_arguments(function, 2):
      raise ValueError(
        f"callbacks: expected functions of (step, scores), got {describe_function(function)}: "
        "write def log(step, scores)"
      )


def _check_functions(options: Any, *names: str) -> None:
  for name in names:
    value = getattr(options, name)
    if value is not None and not callable(value):
      raise ValueError(f"{name}: expected a function or None, got {value!r}")


def _check_least(options: Any, least: int, *names: str) -> None:
  for name in names:
    if getattr(options, name) is not None:
      check_integer(name, getattr(options, name), least)
