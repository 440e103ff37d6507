"""Evaluates models: scores of a task on a whole set."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.models.logits import ROWS, check_logits
from distill_jax.models.networks import trained_model
from distill_jax.objectives.calls import batch_entry
from distill_jax.tasks.objective_terms import OUTPUT, evaluate_terms
from distill_jax.train.accumulator import Accumulator, Evaluated
from distill_jax.train.batch_errors import map_batches
from distill_jax.train.generation import check_sample, sample_text
from distill_jax.train.loss_fn import apply_teacher
from distill_jax.train.optimizers import evaluation_variables
from distill_jax.train.options import check_kind
from distill_jax.train.prediction import (
  Examples,
  HostBatch,
  check_inputs,
  iterate,
  model_outputs,
  split_rows,
  valid_rows,
  with_first,
)
from distill_jax.types import CACHED, SAMPLE, Batch, Model, Objective, Task, TrainState, Variables

Trained = tuple[Model, Variables]


def evaluate(
  model: Any,
  variables: Any,
  examples: Examples,
  task: Task,
  *,
  teacher: Any = None,
  batch_size: int = 256,
) -> dict[str, float]:
  """Returns the scores of a model on a set.

      scores = evaluate(student, result.variables, test, tasks.classification())

  Args:
    model: a Model, or a network as it is, as in `fit`.
    variables: its variables, in the forms that `fit` takes; None: those that it was built with.
    examples: a `Source`, or an iterable of batches whose 'where' marks padding.
    task: what is measured.
    teacher: for metrics that compare with it: (model, variables), or a Model or network with its
      own variables; None: they are left out.
    batch_size: rows at once, of a `Source`.

  Raises:
    ValueError: no variables, no examples, NaN or uint8 images, probabilities as 'logits', no Task,
      outputs and labels that do not fit it, or none of its metrics exists (no example has a label).

  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from distill_jax import models, tasks
  >>> model = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(2), inputs="x")
  >>> examples = [{"x": np.eye(2, dtype=np.float32), "label": np.array([0, 1])}]
  >>> from distill_jax.train import evaluate
  >>> evaluate(model, model.variables, examples, tasks.classification())["accuracy"]
  1.0
  """
  models = [(model, variables)]
  evaluated = evaluate_models(models, examples, task, teacher=teacher, batch_size=batch_size)
  scores = evaluated[0].scores
  if not scores:
    names = [metric.name for metric in task.metrics]
    raise ValueError(
      f"examples: expected some with a label for metrics such as {names[0]!r}, got none: add "
      "labels, or pass teacher= for the metrics that compare with it"
    )
  return scores


def evaluate_models(
  models: Sequence[Trained],
  examples: Examples,
  task: Task,
  *,
  teacher: Any = None,
  predict: bool = False,
  leave_out: bool = False,
  batch_size: int = 256,
) -> list[Evaluated]:
  """Returns what `evaluate` measures of several models, in one pass over the examples.

  The teacher runs once per batch. Sums stay on the device, and are added there.

  Args:
    models: (model, variables) each.
    examples, task, teacher, batch_size: as in `evaluate`.
    predict: whether to return the task's predictions.
    leave_out: whether to return the scores without parts of the examples, of batches each
      (`train.leave_out`); of scores that follow from the task's statistics, or from parts of its
      predictions (`Task.scores_parts`).

  >>> from distill_jax import models, tasks, train
  >>> from distill_jax.types import Variables
  >>> model = models.from_apply(None, lambda w, x: x @ w, variables=jnp.eye(2), inputs="x")
  >>> trained = [(model, Variables(sign * 3 * jnp.eye(2), {})) for sign in (1, -1)]
  >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([0, 1])}
  >>> evaluated = train.evaluate_models(trained, [batch], tasks.classification())
  >>> [model.scores["accuracy"] for model in evaluated]
  [1.0, 0.0]
  """
  check_kind("task", task, (Task,), "a Task such as tasks.classification()")
  batches, first = with_first(iterate(examples, batch_size))
  models = [trained_model("model", *pair, first) for pair in models]
  networks = [("model", *pair) for pair in models]
  if teacher is not None:
    network, values = teacher if _is_pair(teacher) else (teacher, None)
    teacher = trained_model("teacher", network, values, first)
    networks.append(("teacher", *teacher))
  check_inputs(networks, first)
  # A network may split its rows over all devices.
  rows = {name: x[: ROWS * jax.device_count()] for name, x in first.items()}
  for field, model, variables in networks:
    check_logits(field, model, variables, rows)
  if task.generates and _has_predictions(task, predict):
    for model, _ in models:
      check_sample("model", model)
  steps = {}
  classes: Mapping[str, int] | None = None
  for model, _ in models:
    steps[model.apply, model.sample] = jax.jit(
      functools.partial(_measure_model, model, task, predict)
    )
  sums = [Accumulator(task, leave_out) for _ in models]

  def measure(batch: HostBatch) -> None:
    nonlocal classes
    if classes is None:
      classes = _label_classes(task, *models[0], batch)
    batch = _class_numbers(batch, classes, task.ignore_label)
    batch = split_rows(batch, models[0][1])
    teacher_outputs = None
    if teacher is not None:
      teacher_outputs = model_outputs(teacher[0].apply, teacher[1], batch)
    for (model, variables), accumulator in zip(models, sums):
      step = steps[model.apply, model.sample]
      accumulator.add(*step(variables, teacher_outputs, batch))

  for _ in map_batches(measure, batches, "examples"):
    pass
  return [accumulator.result() for accumulator in sums]


def _is_pair(teacher: Any) -> bool:
  return isinstance(teacher, (tuple, list)) and len(teacher) == 2


def _label_classes(task: Task, model: Model, variables: Variables, batch: HostBatch):
  if task.label_classes is None:
    return {}
  return task.label_classes(jax.eval_shape(model_outputs, model.apply, variables, batch))


def _class_numbers(
  batch: HostBatch, classes: Mapping[str, int], ignore_label: int | None
) -> HostBatch:
  """Returns the batch with checked labels; all negative ones are `data.UNLABELED`."""
  negative = {
    name: np.maximum(label, data.UNLABELED)
    for name in classes
    if name in batch and np.issubdtype((label := np.asarray(batch[name])).dtype, np.signedinteger)
  }
  marked = {name: data.mark_unlabeled(label, ignore_label) for name, label in negative.items()}
  return data.class_numbers({**batch, **marked}, classes, data.UNLABELED)


def make_eval_step(
  student: Model, task: Task, teacher: Model | None = None
) -> Callable[[TrainState, Any, Batch], tuple[Any, dict[str, Any]]]:
  """Returns a pure step `(state, teacher_variables, batch) -> (statistics, rows)`; see
  `Accumulator`.

  Rows whose 'where' is False count nowhere.

  Args:
    student: the Model that is evaluated.
    task: what is measured.
    teacher: a Model to compare with; None: nothing is compared.

  >>> import optax
  >>> from distill_jax import models, objectives, tasks, train
  >>> student = models.from_apply(lambda key, x: jnp.eye(2), lambda w, x: x @ w, inputs="x")
  >>> objective = objectives.weighted(hard=(1.0, objectives.labels()))
  >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
  >>> state = train.make_init(student, None, objective, optax.sgd(0.1))(jax.random.key(0), batch)
  >>> task = tasks.classification()
  >>> statistics, _ = jax.jit(train.make_eval_step(student, task))(state, (), batch)
  >>> task.compute(statistics)["accuracy"]
  1.0
  """

  def step(state: TrainState, teacher_variables, batch: Batch):
    teacher_outputs = _teacher_outputs(teacher, teacher_variables, state, batch) or None
    variables = evaluation_variables(state)
    return _measure_model(student, task, False, variables, teacher_outputs, batch)

  return step


def make_terms_step(
  student: Model, task: Task, teacher: Model | None, objective: Objective, compare: bool = True
) -> Callable[[TrainState, Any, Batch], tuple[Any, dict[str, Any]]]:
  """Returns the same step for a task of the objective's terms (`tasks.objective_terms`).

  Args:
    student, task: as in `make_eval_step`.
    teacher: the teacher of the terms; or None.
    objective: evaluated in addition to the task.
    compare: whether the task compares with the teacher, too.
  """

  def step(state: TrainState, teacher_variables, batch: Batch):
    teacher_outputs = _teacher_outputs(teacher, teacher_variables, state, batch)
    variables = evaluation_variables(state)
    learned = Variables(state.params["objective"], state.model_state["objective"])
    outputs = student.apply(*variables, batch, train=False, key=None)[0]
    # One key for all batches and evaluations: what the objective draws is the same in each.
    key = jax.random.key(0)
    terms = evaluate_terms(
      objective, learned, outputs, teacher_outputs, batch, step=state.step, key=key
    )
    outputs = {**outputs, OUTPUT: terms, **_sample(student, task, False, variables, batch)}
    return _measure_outputs(task, False, outputs, batch, compare and teacher_outputs or None)

  return step


def _teacher_outputs(teacher: Model | None, variables: Any, state: TrainState, batch: Batch):
  """Returns the teacher's outputs; those of the moving average for a teacher that is one."""
  is_average = teacher is not None and teacher.ema_update is not None
  return apply_teacher(teacher, state.average if is_average else variables, batch)


def _measure_model(
  model: Model, task: Task, predict: bool, variables, teacher_outputs, batch: Batch
):
  """Returns a batch's statistics, and its rows' predictions and references where they are
  needed.
  """
  outputs = model.apply(*variables, batch, train=False, key=None)[0]
  outputs = {**outputs, **_sample(model, task, predict, variables, batch)}
  return _measure_outputs(task, predict, outputs, batch, teacher_outputs)


def _sample(model: Model, task: Task, predict: bool, variables, batch: Batch) -> dict[str, Any]:
  """Returns the text that the model generates, as an output; {} where the task reads none."""
  if not task.generates or not _has_predictions(task, predict):
    return {}
  return {SAMPLE: sample_text("model", model, variables, batch)}


def _has_predictions(task: Task, predict: bool) -> bool:
  return task.predict is not None and (predict or task.evaluate_predictions is not None)


def _measure_outputs(task: Task, predict: bool, outputs, batch: Batch, teacher_outputs):
  statistics = task.statistics(outputs, batch, teacher_outputs)
  if task.predict is None or not _has_predictions(task, predict):
    return statistics, {}
  references = {}
  if task.evaluate_predictions is not None:
    references = {name: batch_entry(batch, name) for name in task.references}
  teacher = {CACHED + name: x for name, x in (teacher_outputs or {}).items()}
  predictions = task.predict(outputs, {**batch, **teacher})
  return statistics, {
    "predictions": predictions,
    "references": references,
    "where": valid_rows(batch),
  }
