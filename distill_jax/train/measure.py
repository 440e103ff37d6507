"""Chooses what a run measures: the task, the metric that chooses, and an evaluation's step."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from distill_jax import data, tasks
from distill_jax.errors import suggest
from distill_jax.objectives.class_labels import record_entries
from distill_jax.tasks.objective_terms import with_terms
from distill_jax.train.arguments import Arguments, Inputs
from distill_jax.train.batch_checks import Checks, make_checks
from distill_jax.train.batch_errors import name_field, name_shapes
from distill_jax.train.computed import computed_metrics, with_text, without_text
from distill_jax.train.evaluation import make_eval_step, make_terms_step
from distill_jax.train.inputs import check_classes, check_evaluation, has_labels
from distill_jax.train.loss_fn import make_loss_fn
from distill_jax.train.optimizers import evaluation_variables
from distill_jax.train.options import Evaluation
from distill_jax.train.placement import compile_evaluation
from distill_jax.types import Batch, Metric, Model, Objective, Outputs, Task, TrainState


class Measure(NamedTuple):
  """What is measured.

  Attributes:
    task: of the call, or inferred.
    evaluated: the task of `step`, which may have the objective's terms too.
    train_metrics: of training; or None.
    checks: of the batches' labels and weights.
    best: the metric that chooses the best variables.
    step: `(state, teacher's variables, batch) -> (statistics, rows)`, of the evaluation;
      None without one.
  """

  task: Task
  evaluated: Task
  train_metrics: Callable | None
  checks: Checks
  best: Metric
  step: Callable | None


def choose_measure(arguments: Arguments, inputs: Inputs, state: TrainState) -> Measure:
  """Returns the task: the argument, an inferred one, or the objective's terms; checks it on the
  evaluation's examples.

  Raises:
    ValueError: labels, outputs or `best` do not fit.
  """
  evaluation, ignore_label = arguments.evaluation, arguments.run.ignore_label
  example = inputs.example
  if evaluation is not None:
    example = _first_batch(evaluation, arguments.batch_size)
  with name_shapes("evaluation", example, inputs.example), name_field("evaluation"):
    outputs = _output_shapes(arguments.student, state, example)
  task = arguments.task or tasks.infer(outputs, example, ignore_label)
  trained = arguments.task or tasks.infer(outputs, inputs.example, ignore_label) or task
  task_classes = _classes(trained, outputs)
  if task is None and task_classes and set(task_classes) <= set(example):
    task = trained  # Its labels are of another form, which is accepted or refused, not left out.
  if arguments.task is None:
    _check_heads(task_classes or {}, example)
  with record_entries() as entries:
    _term_names(arguments, inputs, state)
  checks = make_checks(
    task_classes,
    entries,
    source=arguments.source,
    example=inputs.example,
    task=arguments.task,
    ignore_label=ignore_label,
  )
  check_classes(checks.classes, arguments.source)
  train_metrics = None if trained is None else trained.train_metrics
  if evaluation is None:
    task = task or tasks.objective_terms(())
    _check_names(task)
    best = next((x for x in task.metrics if x.name == task.decides), task.metrics[0])
    return Measure(task, task, train_metrics, checks, best, None)
  check_classes(checks.classes, evaluation.data)
  whole = task
  is_labeled = has_labels(evaluation.data, task_classes, checks.ignore_label)
  if task is not None and task.generates and is_labeled:
    variables = inputs.teacher_variables
    task = without_text(arguments.student, task, evaluation.best, state, variables, example)
  chosen, evaluated, step = _evaluated(
    arguments, inputs, state, task, task_classes, checks, example
  )
  _check_names(evaluated)
  variables = inputs.teacher_variables
  shapes = check_evaluation(
    step, (state, variables), evaluation.data, example, checks.classes, checks.ignore_label
  )
  best = _best(evaluated, evaluation.best, shapes)
  return Measure(with_text(chosen, whole), evaluated, train_metrics, checks, best, step)


def _check_heads(classes: Mapping[str, int | None], example: Batch) -> None:
  """Raises a ValueError where an evaluation has the labels of some heads of training, not of all.

  Args:
    classes: entries with labels in training.
    example: of the evaluation; without any of the labels the objective's terms are measured.
  """
  missing = sorted(set(classes) - set(example))
  if missing and set(classes) & set(example):
    raise ValueError(
      f"evaluation: expected the labels {missing} too, as in training, got only {sorted(example)}: "
      "add them, or pass the task of what you measure, such as tasks.classification()"
    )


def _check_names(task: Task) -> None:
  names = {"step", "phase", "sparsity", "line_number", "checksum"}
  reserved = sorted(names.intersection(metric.name for metric in task.metrics))
  if reserved:
    raise ValueError(
      f"task: expected metrics of names that the log does not use, got {reserved}: rename them"
    )


def _evaluated(
  arguments: Arguments,
  inputs: Inputs,
  state: TrainState,
  task: Task | None,
  classes: Mapping[str, int | None] | None,
  checks: Checks,
  example: Batch,
) -> tuple[Task, Task, Callable]:
  """Returns the task of a run, that of its evaluation, and the evaluation's step: of labels, of the
  objective's terms, or of both.
  """
  student, teacher, objective = arguments.student, arguments.teacher, arguments.objective
  evaluation = arguments.evaluation
  assert evaluation is not None
  fits = functools.partial(_fits, state=state, inputs=inputs, example=example)
  if task is not None and has_labels(evaluation.data, classes, checks.ignore_label):
    names = [metric.name for metric in task.metrics]
    compared = teacher if fits(make_eval_step(student, task, teacher)) else None
    both = with_terms(task, _term_names(arguments, inputs, state))
    step = make_terms_step(student, both, teacher, objective, compared is not None)
    if evaluation.best not in (None, *names):
      return both, both, step
    # A state, such as a memory bank, is of the training examples.
    if not jax.tree.leaves(state.model_state["objective"]) and fits(step):
      return task, both, step
    return task, task, make_eval_step(student, task, compared)
  if arguments.task is not None:
    _warn_of_no_labels(arguments.task, classes)
  terms = tasks.objective_terms(_term_names(arguments, inputs, state))
  step = make_terms_step(student, terms, teacher, objective)
  comparison = tasks.objective_terms(())
  if not fits(step) and fits(make_eval_step(student, comparison, teacher)):
    return comparison, comparison, make_eval_step(student, comparison, teacher)
  return terms, terms, step


def _warn_of_no_labels(task: Task, classes: Mapping[str, int | None] | None) -> None:
  names = list(classes or ())
  warnings.warn(
    f"evaluation: expected examples with a class in {names} for the metrics of the task, such as "
    f"{task.metrics[0].name!r}, got none: the objective's terms are measured, and choose the "
    "weights; leave task out if you mean this",
    UserWarning,
    stacklevel=2,
  )


def _fits(step: Callable, *, state: TrainState, inputs: Inputs, example: Batch) -> bool:
  """Whether a step can be computed; of objective terms alone also whether any is.

  A term may raise anything on examples without an entry that it reads.
  """
  try:
    statistics, _ = jax.eval_shape(step, state, inputs.teacher_variables, example)
  except (ValueError, TypeError, LookupError, AttributeError):
    return False
  return bool(jax.tree.leaves(statistics))


def _best(task: Task, name: str | None, shapes: Any) -> Metric:
  """Returns the metric that chooses the best variables, among those that the evaluation computes.

  Raises:
    ValueError: the task has no metric of this name, or does not compute it here.
  """
  metrics = {metric.name: metric for metric in task.metrics}
  name = name or task.decides or None
  if name is not None and name not in metrics:
    raise ValueError(f"best: expected a metric of the task, got {name!r}{suggest(name, metrics)}")
  if task.evaluate_predictions is not None:
    return metrics[name] if name else task.metrics[0]
  computed = computed_metrics(task, shapes)
  if name is None and task.metrics[0].name in computed:
    return task.metrics[0]
  if name not in computed:
    wanted = name or task.metrics[0].name
    raise ValueError(
      f"best: expected a metric that the evaluation computes, got {wanted!r}"
      f"{suggest(wanted, computed)}; those that compare with a teacher need a live one"
    )
  return metrics[name]


def _first_batch(evaluation: Evaluation, batch_size: int) -> Batch:
  if isinstance(evaluation.data, data.Source):
    return next(data.eval_batches(evaluation.data, batch_size))
  if isinstance(evaluation.data, data.Pipeline):
    return evaluation.data.first()
  batch = next(iter(evaluation.data), None)
  if batch is None:
    raise ValueError("evaluation: expected batches, got none: give a Source or a list of batches")
  return batch


def _output_shapes(student: Model, state: TrainState, batch: Batch) -> Outputs:
  apply = functools.partial(student.apply, train=False, key=None)
  return jax.eval_shape(lambda v, b: apply(*v, b)[0], evaluation_variables(state), batch)


def _classes(task: Task | None, outputs: Outputs) -> Mapping[str, int | None] | None:
  """Returns the classes of each entry with labels; None without a task."""
  if task is None:
    return None
  return {} if task.label_classes is None else task.label_classes(outputs)


def _term_names(arguments: Arguments, inputs: Inputs, state: TrainState) -> list[str]:
  parts = arguments.student, arguments.teacher, arguments.objective
  return term_names(*parts, state, inputs.teacher_variables, inputs.example)


def term_names(
  student: Model,
  teacher: Model | None,
  objective: Objective,
  state: TrainState,
  teacher_variables: Any,
  batch: Batch,
) -> list[str]:
  """Returns the names of an objective's terms, from shapes of a state and a batch."""
  loss_fn = make_loss_fn(student, teacher, objective)
  if teacher is not None and teacher.ema_update is not None:
    teacher_variables = state.average
  _, aux = jax.eval_shape(
    lambda state, variables, batch: loss_fn(
      state.params, state.model_state, variables, batch, step=state.step, key=state.key
    ),
    state,
    teacher_variables,
    batch,
  )
  return list(aux.terms)


def make_evaluator(
  arguments: Arguments, inputs: Inputs, measure: Measure, state: TrainState
) -> Callable[[TrainState], dict[str, float]] | None:
  """Returns `state -> scores`; None without an evaluation.

  Scores of predictions, such as AUROC, are computed once of the first state: they may not exist on
  these examples, which no shapes show.
  """
  evaluation = arguments.evaluation
  if evaluation is None or measure.step is None:
    return None
  evaluate = compile_evaluation(
    measure.step,
    measure.evaluated,
    inputs.mesh,
    evaluation.data,
    arguments.batch_size,
    inputs.rows,
    classes=measure.checks.classes,
    ignore_label=measure.checks.ignore_label,
  )

  def scores_of(state: TrainState) -> dict[str, float]:
    scores = evaluate(state, inputs.teacher_variables)
    if measure.best.name not in scores:
      raise ValueError(
        f"best: expected the evaluation to compute {measure.best.name!r}, got {sorted(scores)}: it "
        "does not exist on these examples (none with a label, or labels of one class only): give "
        f"other examples, or best={next(iter(scores), 'loss')!r}"
      )
    return scores

  if measure.evaluated.evaluate_predictions is not None:
    scores_of(state)
  return scores_of
