"""Prepares a run: checks its arguments, places its arrays, compiles its step. Nothing is trained or
written yet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.cache import check_run, check_teacher_weights
from distill_jax.data.leaks import check_no_shared_iterator
from distill_jax.distributed import equality, partition, sharding
from distill_jax.models.networks import as_model
from distill_jax.models.variables import (
  as_variables,
  check_no_nan,
  check_start,
  check_weights,
  start_from,
)
from distill_jax.objectives.hyperparameters import schedule_steps
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.arguments import Arguments, Inputs, Intervals, Run, count_steps
from distill_jax.train.batch_checks import (
  Checks,
  check_example,
  warn_of_unshifted_labels,
  with_ignore_label,
)
from distill_jax.train.batch_errors import name_field, name_shapes
from distill_jax.train.directions import check_directions
from distill_jax.train.first_batch import (
  check_run_images,
  check_run_outputs,
  student_variables,
  warn_of_unread_teacher,
)
from distill_jax.train.frozen import warn_of_frozen_statistics
from distill_jax.train.inputs import (
  Stream,
  as_source,
  batches_of,
  check_objective,
  next_batch,
)
from distill_jax.train.learning_rate import with_learning_rate
from distill_jax.train.measure import choose_measure, make_evaluator
from distill_jax.train.options import Evaluation
from distill_jax.train.placement import compile_step, init_on_host, place_teacher
from distill_jax.train.resume_identity import process_settings, resume_settings, run_identity
from distill_jax.train.step import make_init, make_train_step
from distill_jax.train.step_batch import check_no_cached_outputs
from distill_jax.train.stopping import warn_of_idle_patience
from distill_jax.train.term_counts import check_terms
from distill_jax.types import Batch, Model, TrainState


def prepare(arguments: Arguments) -> tuple[Run, TrainState]:
  """Returns the run that `fit`'s arguments describe, and its initial state, placed.

  Raises what `fit` raises before training.
  """
  arguments = _check(arguments)
  inputs = _prepare_inputs(arguments)
  teacher_fingerprint = fingerprint(inputs.teacher_variables)
  state = _initialize(arguments, inputs)
  check_run_images(arguments, inputs, state)
  check_run_outputs(arguments, inputs, state)
  check_directions(arguments.optimizer, state.params)
  warn_of_frozen_statistics(arguments.student, arguments.optimizer, state, inputs.example)
  check_terms(arguments, inputs, state)
  warn_of_unread_teacher(arguments, inputs, state)
  measure = choose_measure(arguments, inputs, state)
  inputs = inputs._replace(example=check_example(arguments.source, inputs.example, measure.checks))
  warn_of_unshifted_labels(inputs.example, measure.checks, arguments.step.augment)
  specs = partition.state_specs(state, inputs.mesh, arguments.run.rules)
  state = sharding.place(state, inputs.mesh, specs)
  settings = resume_settings(arguments)
  identity = run_identity(arguments, state, teacher_fingerprint)
  intervals = _intervals(arguments)
  if inputs.rows is not None:
    shared = process_settings(arguments, inputs, state, measure, intervals)
    equality.assert_equal("run", {**identity, **shared, "settings": settings})
  run = Run(
    arguments=arguments,
    step_fn=_compile_train_step(arguments, inputs, measure.train_metrics, specs),
    teacher_variables=inputs.teacher_variables,
    teacher_fingerprint=teacher_fingerprint,
    stream=_stream(arguments, inputs.rows, measure.checks),
    place=_placer(arguments, inputs),
    num_rows=arguments.batch_size if inputs.rows is None else len(inputs.rows),
    example={name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs.example.items()},
    intervals=intervals,
    evaluate=make_evaluator(arguments, inputs, measure, state),
    task=measure.task,
    best=measure.best,
    identity=identity,
    settings=settings,
  )
  _check_list(run, state)
  return run, state


def _check(arguments: Arguments) -> Arguments:
  """Checks arguments that need no computation; returns them with what a cache decides."""
  cache = arguments.cache
  check_objective(arguments.objective)
  source = as_source("source", arguments.source)
  steps = arguments.steps
  if arguments.epochs is not None:
    steps = count_steps(source, arguments.epochs, arguments.batch_size)
  arguments = arguments._replace(source=source, steps=steps)
  arguments = _with_models(arguments)
  arguments = arguments._replace(evaluation=_repeatable(arguments.evaluation))
  check_no_shared_iterator(arguments.source, getattr(arguments.evaluation, "data", None))
  arguments = arguments._replace(run=with_ignore_label(arguments.run, arguments.task, source))
  if cache is None:
    return arguments
  run = arguments.run
  # Of a cache without views, what the student alone reads may have a new one each epoch.
  if cache.has_views and not run.num_views:
    run = dataclasses.replace(run, num_views=cache.num_views)
  if arguments.teacher_variables is not None:
    variables = as_variables("teacher_variables", arguments.teacher_variables)
    check_teacher_weights(cache, variables)
  source = arguments.source
  examples = source if isinstance(source, data.Source) else _first_batch(source)
  num_views = getattr(source, "num_views", run.num_views)
  step = arguments.step
  check_run(cache, examples, augment=step.augment, num_views=num_views, mix=step.mix)
  return arguments._replace(teacher_variables=None, run=run)


def _with_models(arguments: Arguments) -> Arguments:
  """Returns the arguments with networks of other libraries as Models."""
  student, teacher, source = arguments.student, arguments.teacher, arguments.source
  entries: list[str] = []
  if not (isinstance(student, Model) and isinstance(teacher, Model | None)):
    entries = list(source.arrays if isinstance(source, data.Source) else _first_batch(source))
  student = as_model("student", student, entries)
  teacher = None if teacher is None else as_model("teacher", teacher, entries)
  return arguments._replace(student=student, teacher=teacher)


def _check_list(run: Run, state: TrainState) -> None:
  """Checks the batches of a list, which are all there before training."""
  source, steps = run.arguments.source, run.intervals.steps
  if not isinstance(source, data.Pipeline) or source.length is None:
    return
  if source.epochs is not None and source.epochs * source.length < steps:
    raise ValueError(
      f"epochs: expected at least {-(-steps // source.length)} of {source.length} batches for "
      f"{steps} steps, got {source.epochs}: give more, or train for steps="
      f"{source.epochs * source.length}"
    )
  batches = iter(run.stream(0))
  for step in range(1, min(source.length, steps) + 1):
    batch = next_batch(batches, step, run.arguments.batch_size, run.num_rows)
    if data.shape_change(batch, run.example):
      with name_shapes(f"source: batch {step - 1}, counted from 0", batch, run.example):
        jax.eval_shape(run.step_fn, state, run.teacher_variables, run.place(batch))


def _repeatable(evaluation: Evaluation | None) -> Evaluation | None:
  """Returns an evaluation of a `Source` or of batches that can be iterated again and again."""
  if evaluation is None:
    return None
  examples = as_source("evaluation", evaluation.data)
  if isinstance(examples, data.Pipeline):
    with name_field("evaluation"):
      examples.check_ends()
    if examples.is_one_shot:
      raise ValueError(
        "evaluation: expected batches that can be iterated again and again, got "
        f"{examples.name}, which is empty after the first evaluation: pass a list, a Source or the "
        "function that makes the iterator"
      )
  return dataclasses.replace(evaluation, data=examples)


def _first_batch(source: Any) -> Batch:
  """Returns the first batch of a pipeline; of one that can be read once nothing is lost."""
  return source.first() if isinstance(source, data.Pipeline) else next(iter(source(0)))


def _prepare_inputs(arguments: Arguments) -> Inputs:
  teacher, variables, batch_size = (
    arguments.teacher,
    arguments.teacher_variables,
    arguments.batch_size,
  )
  mesh = arguments.run.mesh or sharding.make_mesh()
  sharding.check_mesh(mesh)
  sharding.check_divisible(batch_size, mesh, microbatches=arguments.step.microbatches)
  local_rows = sharding.local_rows(mesh, batch_size)
  rows = local_rows if jax.process_count() > 1 else None
  example = _example(arguments, rows)
  if arguments.step.on_policy is not None:
    check_no_cached_outputs(example)
  if rows is not None:
    example = {name: np.resize(x, (batch_size, *x.shape[1:])) for name, x in example.items()}
  if variables is not None and teacher is not None:
    variables = as_variables("teacher_variables", variables)
    if teacher.ema_update is None:
      check_weights(teacher, variables, example)
  if teacher is not None:
    check_no_nan("teacher_variables", variables or teacher.variables)
  rules = () if arguments.cache is not None else arguments.run.teacher_rules
  return Inputs(mesh, rows, example, place_teacher(teacher, variables, mesh, rules))


def _example(arguments: Arguments, rows: np.ndarray | None) -> Batch:
  """Returns the first batch, labels unchecked; a pipeline begins with it again in training."""
  source = arguments.source
  if isinstance(source, data.Pipeline):
    first = source.first()
    arguments = arguments._replace(source=lambda start: [first])
  example = next(iter(_stream(arguments, rows, Checks({}))(0)), None)
  if example is None:
    raise ValueError("source: expected batches from source(0), got none: repeat the data")
  num_rows = arguments.batch_size if rows is None else len(rows)
  got = data.count_rows(example)
  if got != num_rows:
    raise ValueError(
      f"batch_size: expected the {got} rows of the source's first batch, got {num_rows}: make them "
      "equal"
    )
  return example


def _initialize(arguments: Arguments, inputs: Inputs) -> TrainState:
  student = arguments.student
  if arguments.student_variables is not None:
    student = start_from(student, arguments.student_variables, inputs.example)
  init = make_init(
    student,
    arguments.teacher,
    arguments.objective,
    arguments.optimizer,
    on_policy=arguments.step.on_policy,
  )
  with init_on_host(inputs.mesh), schedule_steps(arguments.steps):
    state = init(jax.random.key(arguments.seed), inputs.example)
    check_start(student, student_variables(state))
    field = "student" if arguments.student_variables is None else "student_variables"
    check_no_nan(field, student_variables(state))
    return state


def _intervals(arguments: Arguments) -> Intervals:
  evaluation, checkpoints = arguments.evaluation, arguments.checkpoints
  save = None if checkpoints is None else checkpoints.every
  # Without an evaluation nothing but the given interval asks for a checkpoint.
  every = save if evaluation is None else evaluation.every
  if evaluation is None and checkpoints is None:
    every = arguments.steps
  evaluate = every or max(1, arguments.steps // 10)
  if evaluation is not None:
    warn_of_idle_patience(evaluation.patience, arguments.steps, evaluate)
  return Intervals(arguments.steps, evaluate, save or evaluate)


def _stream(arguments: Arguments, rows: np.ndarray | None, checks: Checks) -> Stream:
  return batches_of(
    arguments.source,
    arguments.batch_size,
    arguments.seed,
    arguments.run,
    checks=checks,
    cache=arguments.cache,
    rows=rows,
  )


def _placer(arguments: Arguments, inputs: Inputs) -> Callable[[Batch], Batch]:
  if inputs.rows is None:
    return lambda batch: batch  # The compiled step takes host batches.
  return lambda batch: sharding.place_rows(batch, inputs.mesh, arguments.batch_size)


def _compile_train_step(
  arguments: Arguments, inputs: Inputs, train_metrics: Callable | None, specs: TrainState
) -> Callable:
  options = arguments.step
  if options.metrics is None:
    options = dataclasses.replace(options, metrics=train_metrics)
  step = make_train_step(
    arguments.student, arguments.teacher, arguments.objective, arguments.optimizer, options
  )
  step = with_learning_rate(step, arguments.run.learning_rate)
  return compile_step(step, inputs.mesh, specs)
