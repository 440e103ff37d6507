"""Defines the few shapes that everything agrees on."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import reduce

Tree = Any  # a pytree of arrays
Batch = Mapping[str, Any]
"""Arrays of one batch, rows first: 'id' (row in the full named split), 'view', 'image' or 'tokens',
'label' (int [B], rows of probabilities [B, C], or what the task reads), 'where' (valid rows, bool
[B]), 'generated' (rows that the student generated, bool [B]), 'teacher/...' when cached."""

CACHED = "teacher/"
"""Begins the names of a batch's entries that are outputs of the teacher."""

_NOT_INPUTS = ("generated", "id", "label", "view", "where")

Outputs = Mapping[str, Any]
"""A model's outputs for a batch: 'logits' [B, C] and every named feature that a term may read."""


def input_names(entries: Iterable[str]) -> list[str]:
  """Returns the names of a batch's inputs: all but ids, labels and teacher outputs."""
  return [name for name in entries if name not in _NOT_INPUTS and not name.startswith(CACHED)]


class Variables(NamedTuple):
  """A model's arrays: `params` are trained; `state` (batch statistics) changes with every batch."""

  params: Tree
  state: Tree


Sample = Callable[[Variables, jax.Array | None, Batch], tuple[jax.Array, jax.Array]]
"""`(Variables, key, batch) -> (tokens int32 [B, L], lengths int32 [B])`: generates one sequence for
each row. `tokens` have no start token and are the end token from `lengths` on; `lengths` do not
count it. A row that never ended has length L."""

SAMPLE = "model/sample"
"""The output under which `Task.predict` of a task that `generates` finds (tokens, lengths)."""


class Model(NamedTuple):
  """A network as pure functions; teachers and students are both Models.

  Attributes:
    init: `(key, batch) -> Variables`.
    apply: `(params, state, batch, *, train, key) -> (Outputs, state)`. `train` is a Python bool,
      `key` a typed PRNG key or None (then the model must not draw). Only `params` are
      differentiated.
    variables: the weights the model was built with, if it was built with any. A frozen teacher
      needs them (or `teacher_variables=` in `train.fit`); `init` returns a copy of them.
    ema_update: `(average, student, step) -> average`, all `Variables`, for a teacher that is an
      exponential moving average (EMA) of the student; the train state holds it. None: it is not.
    reads: names of the teacher's outputs that `apply` reads in training, from the batch's
      'teacher/name' (`models.shared_prefix`); the step adds those that the teacher has.
    sample: generates text, in evaluation mode, under jit; see `Sample`. Tasks that score text need
      it: `model._replace(sample=...)`. None: the model generates none.
  """

  init: Callable[..., Variables]
  apply: Callable[..., tuple[Outputs, Tree]]
  variables: Variables | None = None
  ema_update: Callable[..., Variables] | None = None
  reads: tuple[str, ...] = ()
  sample: Sample | None = None


class Objective(NamedTuple):
  """What to minimize, as pure functions.

  Attributes:
    init: `(key, student_outputs, teacher_outputs) -> Variables`, those that the objective learns
      (projections); empty trees where there are none. The outputs may be `ShapeDtypeStruct`s.
    apply: `(params, state, student, teacher, batch, *, step, key, axis_name=None) ->
      (terms, state)` with `terms = {name: (weight, value)}`; a value is `(values, where)`,
      unreduced with the valid ones (None: all), or a scalar where the loss relates rows. The step
      passes `axis_name` under `pmap` and `shard_map` only, and only to a function that has it: a
      scalar of one without it is averaged over devices.
  """

  init: Callable[..., Variables]
  apply: Callable[..., tuple[dict[str, tuple[Any, Any]], Tree]]


OnPolicy = Callable[[Variables, jax.Array, Batch], Batch]
"""`(student Variables, key, batch) -> batch`: replaces rows by sequences that the student
generates; the new batch marks them in 'generated'."""


@dataclasses.dataclass(frozen=True)
class Metric:
  """A score of a task, and how it is written.

  Attributes:
    name: its key in what `Task.compute` returns.
    title: in words, for tables and axes: 'accuracy', 'perplexity'.
    unit: '%', 'nats', 'px'; empty where there is none.
    better: 'max' or 'min'.
    format: a format specification of Python. One that ends in '%' ('.2%') multiplies by 100; the
      unit is then '%', and differences are in points.
    short: title of its column in tables with a row per network ('ECE'); empty: `title`.
    detail: tables that show it. 0: all; 1: all but those over several runs; 2: only those with a
      row per metric; 3: none, `Task.figures` shows it. The first metric of a task is in all of
      them.

  Raises:
    ValueError: `better` is neither.

  >>> Metric("rmse", "root mean squared error", unit="px", better="min", format=".2f").better
  'min'
  """

  name: str
  title: str
  unit: str = ""
  better: str = "max"
  format: str = ".4f"
  short: str = ""
  detail: int = 1

  def __post_init__(self):
    if self.better not in ("max", "min"):
      text = str(self.better).lower()
      is_low = any(word in text for word in ("min", "low", "less", "small", "down"))
      raise ValueError(
        f"better: expected 'max' or 'min' for the metric {self.name!r}, got {self.better!r}: write "
        f"{'min' if is_low else 'max'!r}"
      )


class Task(NamedTuple):
  """What a kind of problem measures: plain data and pure functions. `distill_jax.tasks` makes them.

  Attributes:
    metrics: the scores, in the order of a report. The first one heads it, and decides which
      variables `fit` returns where nothing else does.
    statistics: `(student Outputs, batch, teacher Outputs or None) -> tree of sums` over the batch's
      valid rows. Runs on the device, under jit; the sums of several batches, devices and processes
      are added.
    compute: `added statistics (host arrays) -> {metric name: float}`.
    label_classes: `Outputs (or their shapes) -> {entry of the batch: number of classes}`: the
      entries that hold class numbers, 0 to that minus 1; a number of None allows any. None: no
      entry does.
    ignore_label: the class number that marks examples without a label, in addition to negative
      ones; None: there is none.
    train_metrics: `(student Outputs, batch) -> {name: (sum, count)}`, cheap ones for the log of
      training; or None.
    predict: `(student Outputs, batch) -> {name: array}`, one row per example, what the host needs;
      or None. Next to a teacher the batch has its outputs as 'teacher/...'.
    evaluate_predictions: `(predictions, references) -> {metric name: float}` on the host, for
      scores that are no sums over examples; both are mappings of arrays over all examples,
      `references` the batch's entries of that name.
    references: names of the batch's entries that `evaluate_predictions` reads; `figures` has them,
      too.
    figures: `(entries, references, class_names) -> report blocks`, the pictures and tables of this
      kind of problem, from the `report.Entry` of each network; or None.
    figure_references: names of further entries that `figures` reads where the examples have them.
    scores_parts: whether `evaluate_predictions` scores any part of the examples, and quickly: a
      report calls it without one of 20 parts at a time, for confidence intervals.
    groups: the entry that numbers examples that belong together, such as the slices of a patient;
      a run raises where training and evaluation share a number. "": none.
    generates: whether `predict` reads text that the model generates, `outputs[types.SAMPLE]`. Each
      network's `Model.sample` generates it: in a report, and in the evaluations of `fit` where the
      metric that chooses the weights comes from `evaluate_predictions`.
    decides: the metric that chooses the weights; "": the first one. `train.Evaluation(best=)`
      replaces it.

  >>> def compute(sums):
  ...   return {"error": float(sums[0] / sums[1])}
  >>> def statistics(outputs, batch, teacher):
  ...   return reduce.total(jnp.abs(outputs["x"] - batch["label"]), batch.get("where"))
  >>> task = Task((Metric("error", "mean error", better="min"),), statistics, compute)
  >>> task.compute(task.statistics({"x": jnp.zeros(2)}, {"label": jnp.array([1.0, 3.0])}, None))
  {'error': 2.0}
  """

  metrics: tuple[Metric, ...]
  statistics: Callable[..., Any]
  compute: Callable[[Any], dict[str, float]]
  label_classes: Callable[[Outputs], Mapping[str, int | None]] | None = None
  ignore_label: int | None = None
  train_metrics: Callable[..., dict[str, Any]] | None = None
  predict: Callable[..., dict[str, Any]] | None = None
  evaluate_predictions: Callable[..., dict[str, float]] | None = None
  references: tuple[str, ...] = ("label",)
  figures: Callable[..., Any] | None = None
  figure_references: tuple[str, ...] = ()
  scores_parts: bool = False
  groups: str = ""
  generates: bool = False
  decides: str = ""

  def with_metric(self, metric: Metric, statistics: Callable[..., reduce.Pair]) -> "Task":
    """Returns the task with one more metric: a mean over what `statistics` counts.

        top3 = Metric("top3", "top-3 accuracy", "%", format=".2%")
        task = classification().with_metric(top3, lambda outputs, batch, teacher:
        reduce.total(hits(outputs, batch)))

    Args:
      metric: of a name that the task does not have yet.
      statistics: `(student Outputs, batch, teacher Outputs or None) -> (sum, count)`, as
        `reduce.total` returns them; `where=batch.get("where")` leaves padding out.

    Raises:
      ValueError: the task has a metric of this name; when it is measured, `statistics` returns
        something else.
    """
    names = [m.name for m in self.metrics]
    if metric.name in names:
      raise ValueError(f"metric: expected a new name, got {metric.name!r}: the task has {names}")

    def more_statistics(outputs, batch, teacher):
      pair = statistics(outputs, batch, teacher)
      if not isinstance(pair, tuple) or [jnp.shape(x) for x in pair] != [(), ()]:
        raise ValueError(
          f"metric {metric.name!r}: expected its statistics to return (sum, count), two numbers, "
          f"got {jax.tree.map(jnp.shape, pair)}: return reduce.total(values, batch.get('where')), "
          "values one a row"
        )
      return {"task": self.statistics(outputs, batch, teacher), metric.name: pair}

    def compute(sums):
      mean = {metric.name: float(reduce.value(sums[metric.name]))}
      # A mean of nothing is no score.
      return self.compute(sums["task"]) | (mean if sums[metric.name][1] > 0 else {})

    return self._replace(
      metrics=(*self.metrics, metric), statistics=more_statistics, compute=compute
    )


class Skips(NamedTuple):
  """Numbers of updates skipped because the loss or a gradient was not finite; int32 scalars.

  Attributes:
    total: in all.
    streak: in a row, up to now.
    longest: the longest streak so far.
  """

  total: jax.Array
  streak: jax.Array
  longest: jax.Array


class TrainState(NamedTuple):
  """Everything that changes during training, and everything that a checkpoint holds.

  Attributes:
    step: number of batches consumed, int32; the position in the data follows from it.
    key: typed PRNG key; every random number folds `step` (or an example id) into it.
    params: `{'student': ..., 'objective': ...}`; both are trained.
    model_state: `{'student': ..., 'objective': ...}`: batch statistics, memory banks.
    opt_state: the optimizer's state.
    average: `Variables` of an EMA teacher; `()` without one.
    skips: see `Skips`.
  """

  step: jax.Array
  key: jax.Array
  params: dict[str, Tree]
  model_state: dict[str, Tree]
  opt_state: Tree
  average: Any
  skips: Skips
