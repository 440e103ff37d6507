"""Times pairs of programs: each function takes a problem and a number of samples."""

import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import handwritten
import jax
import numpy as np
import optax
from problems import DISTILLED, SUPERVISED, Problem
from timing import Ratio, Run, between, compare

from distill_jax import data, tasks, teachers
from distill_jax.train import (
  CheckpointOptions,
  RunOptions,
  StepOptions,
  fit,
  make_init,
  make_train_step,
)
from distill_jax.types import Model, Objective

EVERY = 50
"""Steps between two reports of `fit`: its default."""


def library_to_hand(problem: Problem, pairs: int) -> Ratio:
  """Times the library's step / one written by hand, after a check that they are equal."""
  ours, theirs = library_step(problem, problem.teacher), step_by_hand(problem)
  check_same(problem, ours, theirs)
  library, by_hand = _library(problem, problem.teacher, step=ours), _by_hand(problem, theirs)
  return compare(library, by_hand, pairs=pairs, calls=problem.calls)


def one_jit_to_two(problem: Problem, pairs: int) -> Ratio:
  """Times a distillation step / the student's step and the teacher's inference, in two jits."""
  student, teacher = _library(problem, None), _inference(problem)

  def separate(calls):
    return [(student(1), teacher(1)) for _ in range(calls)][-1]

  return compare(_library(problem, problem.teacher), separate, pairs=pairs, calls=problem.calls)


def cached_to_supervised(problem: Problem, pairs: int) -> Ratio:
  """Times a step with a cached teacher / one without; batches are host arrays, as a cache's are."""
  batch = problem.batch()
  cached_batch = batch | {"teacher/logits": np.asarray(_inference(problem)(1))}
  cached = _library(problem, teachers.cached(), cached_batch)
  supervised = _library(problem, None, batch)
  return compare(cached, supervised, pairs=pairs, calls=problem.calls)


def fit_to_step(problem: Problem, pairs: int) -> Ratio:
  """Times `fit` with its data, reports and files / the step on a batch that is on the device."""
  times: Ratio = Ratio([], [])
  bare_step = _library(problem, problem.teacher)
  original_batches = data.batches
  steps = EVERY * (pairs + 1) + 1

  def timed(*args, **kwargs):
    return between(original_batches(*args, **kwargs), bare_step, every=EVERY, times=times)

  with tempfile.TemporaryDirectory() as folder, mock.patch.object(data, "batches", timed):
    fit(
      problem.student,
      problem.teacher,
      DISTILLED,
      problem.optimizer,
      problem.source,
      steps=steps,
      batch_size=problem.batch_size,
      run=RunOptions(log_every=EVERY, progress=False),
      checkpoints=CheckpointOptions(folder, every=steps),
    )
  return times


def counts_to_forward(problem: Problem, pairs: int) -> Ratio:
  """Times the student's evaluation with a segmentation's counts / its forward pass."""
  task = tasks.segmentation(ignore_label=255)
  batch = jax.device_put(problem.batch())
  variables = problem.student.init(jax.random.key(0), batch)

  def forward(variables, batch):
    return problem.student.apply(*variables, batch, train=False, key=None)[0]["logits"]

  def evaluation(variables, batch):
    return task.statistics({"logits": forward(variables, batch)}, batch, None)

  def run(step) -> Run:
    return lambda calls: [step(variables, batch) for _ in range(calls)][-1]

  ours, theirs = run(jax.jit(evaluation)), run(jax.jit(forward))
  return compare(ours, theirs, pairs=pairs, calls=problem.calls)


def run_steps(
  student: Model, teacher: Model | None, objective: Objective, batches: Sequence[Any]
) -> Run:
  """Returns a run of one step on each batch."""
  optimizer = optax.adam(1e-3)
  step = make_train_step(student, teacher, objective, optimizer, StepOptions())
  compiled = jax.jit(step, donate_argnums=0)
  state = make_init(student, teacher, objective, optimizer)(jax.random.key(0), batches[0])
  variables = () if teacher is None or teacher.variables is None else teacher.variables

  def run(calls):
    nonlocal state
    for batch in [batch for _ in range(calls) for batch in batches]:
      state, metrics = compiled(state, variables, batch)
    return state, metrics

  return run


def library_step(problem: Problem, teacher: Model | None):
  """Returns the library's jitted step, which measures accuracy as `fit` does."""
  options = StepOptions(metrics=tasks.classification().train_metrics)
  step = make_train_step(problem.student, teacher, _objective(teacher), problem.optimizer, options)
  return jax.jit(step, donate_argnums=0)


def step_by_hand(problem: Problem):
  """Returns the jitted step that is written by hand."""
  return jax.jit(handwritten.make_step(*problem.by_hand, problem.optimizer), donate_argnums=0)


def check_same(problem: Problem, ours, theirs, steps: int = 3) -> None:
  """Checks that the library's jitted step and the one by hand agree to rounding.

  Raises:
    AssertionError: they do not.
  """
  state, by_hand = _state(problem, problem.teacher, problem.batch()), _by_hand_state(problem)
  batches = data.batches(problem.source, problem.batch_size, seed=0)
  for batch, _ in zip(batches, range(steps)):
    state, metrics = ours(state, problem.teacher.variables, batch)
    by_hand, loss, accuracy = theirs(
      by_hand, problem.teacher.variables, batch["image"], batch["label"]
    )
    for name, expected in {"loss": loss, "accuracy": accuracy}.items():
      value, count = metrics[name]
      np.testing.assert_allclose(value / count, expected, rtol=1e-5, err_msg=name)
  variables = state.params["student"], state.model_state["student"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), variables, by_hand[:2]
  )


def _library(problem: Problem, teacher: Model | None, batch=None, step=None) -> Run:
  """Returns a run of the library's step, always on one batch; None: a batch on the device."""
  batch = jax.device_put(problem.batch()) if batch is None else batch
  step = step or library_step(problem, teacher)
  state = _state(problem, teacher, batch)
  teacher_variables = () if teacher is None else teacher.variables

  def run(calls):
    nonlocal state
    for _ in range(calls):
      state, metrics = step(state, teacher_variables, batch)
    return state, metrics

  return run


def _by_hand(problem: Problem, step) -> Run:
  state = _by_hand_state(problem)
  batch = jax.device_put(problem.batch())
  images, labels = batch["image"], batch["label"]

  def run(calls):
    nonlocal state
    for _ in range(calls):
      state, loss, accuracy = step(state, problem.teacher.variables, images, labels)
    return state, loss, accuracy

  return run


def _inference(problem: Problem) -> Run:
  def apply(variables, batch):
    return problem.teacher.apply(*variables, batch, train=False, key=None)[0]["logits"]

  compiled, batch = jax.jit(apply), jax.device_put(problem.batch())
  return lambda calls: [compiled(problem.teacher.variables, batch) for _ in range(calls)][-1]


def _state(problem: Problem, teacher: Model | None, batch):
  """Returns a new state: a step donates it."""
  init = make_init(problem.student, teacher, _objective(teacher), problem.optimizer)
  return init(jax.random.key(0), batch)


def _by_hand_state(problem: Problem):
  """Returns the same initial weights in new buffers."""
  state = _state(problem, problem.teacher, problem.batch())
  params = state.params["student"]
  return params, state.model_state["student"], problem.optimizer.init(params)


def _objective(teacher: Model | None) -> Objective:
  return SUPERVISED if teacher is None else DISTILLED
