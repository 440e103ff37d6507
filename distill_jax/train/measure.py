"""Chooses what a run measures: the task, its first metric, and an evaluation's step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import data, tasks
from distill_jax.errors import suggest
from distill_jax.train.arguments import Arguments, Inputs
from distill_jax.train.evaluation import make_eval_step, make_terms_step
from distill_jax.train.inputs import check_classes, check_evaluation
from distill_jax.train.loss_fn import make_loss_fn
from distill_jax.train.optimizers import evaluation_variables
from distill_jax.train.options import Evaluation
from distill_jax.train.placement import compile_evaluation
from distill_jax.types import Batch, Metric, Task, TrainState


class Measure(NamedTuple):
  """What is measured: the task, its number of classes, and an evaluation's step with its arguments
  from a state.
  """

  task: Task
  num_classes: int | None
  best: Metric
  step: Callable
  arguments: Callable[[TrainState], Any]


def choose_measure(arguments: Arguments, inputs: Inputs, state: TrainState) -> Measure:
  """Returns the task: the argument, an inferred one, or the objective's terms; checks it on the
  evaluation's examples.
  """
  student, evaluation = arguments.student, arguments.evaluation
  example = inputs.example
  if evaluation is not None:
    example = _first_batch(evaluation, arguments.batch_size)
  apply = functools.partial(student.apply, train=False, key=None)
  outputs = jax.eval_shape(lambda v, b: apply(*v, b)[0], evaluation_variables(state), example)
  task = arguments.task or tasks.infer(outputs, example)
  if task is None:
    teacher, objective = arguments.teacher, arguments.objective
    task = tasks.objective_terms(_term_names(arguments, inputs, state))
    measure = Measure(
      task,
      None,
      task.metrics[0],
      make_terms_step(student, task, teacher, objective),
      lambda state: (state, _teacher_of(arguments, inputs, state)),
    )
  else:
    measure = Measure(
      task,
      None if task.num_classes is None else task.num_classes(outputs),
      task.metrics[0],
      make_eval_step(student, task),
      lambda state: (evaluation_variables(state), ()),
    )
  check_classes(measure.num_classes, arguments.source)
  names = [metric.name for metric in measure.task.metrics]
  reserved = sorted({"step", "phase", "sparsity"}.intersection(names))
  if reserved:
    raise ValueError(
      f"task: expected metrics of names that the log does not use, got {reserved}: rename them"
    )
  if evaluation is None:
    return measure
  if evaluation.best is not None:
    measure = measure._replace(best=_metric(task, evaluation.best))
  shapes = check_evaluation(
    measure.step, measure.arguments(state), evaluation.data, example, measure.num_classes
  )
  _check_best(measure, shapes)
  return measure


def _check_best(measure: Measure, shapes: Any) -> None:
  """Checks on zeros that the evaluation computes the metric that chooses the best variables."""
  if measure.task.evaluate_predictions is not None:
    return
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  scores = measure.task.compute(zeros)
  if measure.best.name not in scores:
    raise ValueError(
      f"best: expected a metric that the evaluation computes, got {measure.best.name!r}"
      f"{suggest(measure.best.name, scores)}; those that compare with a teacher are not computed"
    )


def _first_batch(evaluation: Evaluation, batch_size: int) -> Batch:
  if isinstance(evaluation.data, data.Source):
    return next(data.eval_batches(evaluation.data, batch_size))
  batch = next(iter(evaluation.data), None)
  if batch is None:
    raise ValueError("evaluation: expected batches, got none: give a Source or a list of batches")
  return batch


def _term_names(arguments: Arguments, inputs: Inputs, state: TrainState) -> list[str]:
  loss_fn = make_loss_fn(arguments.student, arguments.teacher, arguments.objective)
  loss_fn = functools.partial(loss_fn, step=state.step, key=state.key)
  teacher_variables = _teacher_of(arguments, inputs, state)
  _, aux = jax.eval_shape(
    loss_fn, state.params, state.model_state, teacher_variables, inputs.example
  )
  return list(aux.terms)


def _teacher_of(arguments: Arguments, inputs: Inputs, state: TrainState) -> Any:
  teacher = arguments.teacher
  follows = teacher is not None and teacher.ema_update is not None
  return state.average if follows else inputs.teacher_variables


def _metric(task: Task, name: str) -> Metric:
  metrics = {metric.name: metric for metric in task.metrics}
  if name not in metrics:
    raise ValueError(f"best: expected a metric of the task, got {name!r}{suggest(name, metrics)}")
  return metrics[name]


def make_evaluator(
  arguments: Arguments, inputs: Inputs, measure: Measure
) -> Callable[[TrainState], dict[str, float]] | None:
  evaluation = arguments.evaluation
  if evaluation is None:
    return None
  evaluate = compile_evaluation(
    measure.step,
    measure.task,
    inputs.mesh,
    evaluation.data,
    arguments.batch_size,
    inputs.rows,
  )
  return lambda state: evaluate(*measure.arguments(state))
