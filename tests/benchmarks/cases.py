"""The measured pairs. Each function takes a problem and a number of samples, and gives their Ratio."""

import tempfile
from unittest import mock

import handwritten
import jax
import numpy as np
from problems import DISTILLED, SUPERVISED, Problem
from timing import Ratio, Run, between, compare

from distill_jax import data, teachers
from distill_jax.train import fit, make_init, make_train_step
from distill_jax.types import Model, Objective

EVERY = 50  # steps between two reports of `fit`: its default


def library_to_hand(problem: Problem, pairs: int) -> Ratio:
  """The library's step / one written by hand for these networks, once both are known to compute the same."""
  ours, theirs = library_step(problem, problem.teacher), step_by_hand(problem)
  check_same(problem, ours, theirs)
  library, by_hand = _library(problem, problem.teacher, step=ours), _by_hand(problem, theirs)
  return compare(library, by_hand, pairs=pairs, calls=problem.calls)


def one_jit_to_two(problem: Problem, pairs: int) -> Ratio:
  """A distillation step / the student's step and the teacher's inference, each jitted apart."""
  student, teacher = _library(problem, None), _inference(problem)

  def apart(calls):
    return [(student(1), teacher(1)) for _ in range(calls)][-1]

  return compare(_library(problem, problem.teacher), apart, pairs=pairs, calls=problem.calls)


def cached_to_supervised(problem: Problem, pairs: int) -> Ratio:
  """A step with a cached teacher / a step without; batches are host arrays, as where a cache is read."""
  batch = problem.batch()
  teacher_outputs = batch | {"teacher/logits": np.asarray(_inference(problem)(1))}
  cached, supervised = (
    _library(problem, teachers.cached(), teacher_outputs),
    _library(problem, None, batch),
  )
  return compare(cached, supervised, pairs=pairs, calls=problem.calls)


def fit_to_step(problem: Problem, pairs: int) -> Ratio:
  """`fit` with its data, reports and files / the bare step on a batch that is on the device already."""
  times, bare, made = Ratio([], []), _library(problem, problem.teacher), data.batches
  steps = EVERY * (pairs + 1) + 1

  def watched(*args, **kwargs):
    return between(made(*args, **kwargs), bare, every=EVERY, times=times)

  with tempfile.TemporaryDirectory() as folder, mock.patch.object(data, "batches", watched):
    fit(
      problem.student,
      problem.teacher,
      DISTILLED,
      problem.optimizer,
      problem.source,
      steps=steps,
      batch_size=problem.batch_size,
      log_every=EVERY,
      eval_every=steps,
      folder=folder,
      progress=False,
    )
  return times


def library_step(problem: Problem, teacher: Model | None):
  step = make_train_step(problem.student, teacher, _objective(teacher), problem.optimizer)
  return jax.jit(step, donate_argnums=0)


def step_by_hand(problem: Problem):
  return jax.jit(handwritten.make_step(*problem.by_hand, problem.optimizer), donate_argnums=0)


def check_same(problem: Problem, ours, theirs, steps: int = 3) -> None:
  """Raises an AssertionError unless the library's jitted step and the one by hand agree to rounding.

  Both take the same batches, and each its own parameters on to the next step.
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
  learned = state.params["student"], state.model_state["student"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), learned, by_hand[:2]
  )


def _library(problem: Problem, teacher: Model | None, batch=None, step=None) -> Run:
  """The library's step, over and over on a batch that is on the device unless one is given."""
  batch = jax.device_put(problem.batch()) if batch is None else batch
  step, state = step or library_step(problem, teacher), _state(problem, teacher, batch)
  taught_by = () if teacher is None else teacher.variables

  def run(calls):
    nonlocal state
    for _ in range(calls):
      state, metrics = step(state, taught_by, batch)
    return state, metrics

  return run


def _by_hand(problem: Problem, step) -> Run:
  state, batch = _by_hand_state(problem), jax.device_put(problem.batch())
  taught_by, images, labels = problem.teacher.variables, batch["image"], batch["label"]

  def run(calls):
    nonlocal state
    for _ in range(calls):
      state, loss, accuracy = step(state, taught_by, images, labels)
    return state, loss, accuracy

  return run


def _inference(problem: Problem) -> Run:
  def apply(variables, batch):
    return problem.teacher.apply(*variables, batch, train=False, key=None)[0]["logits"]

  compiled, batch = jax.jit(apply), jax.device_put(problem.batch())
  return lambda calls: [compiled(problem.teacher.variables, batch) for _ in range(calls)][-1]


def _state(problem: Problem, teacher: Model | None, batch):
  """A state of its own: a step donates it."""
  init = make_init(problem.student, teacher, _objective(teacher), problem.optimizer)
  return init(jax.random.key(0), batch)


def _by_hand_state(problem: Problem):
  """The same initial weights, in buffers of their own."""
  state = _state(problem, problem.teacher, problem.batch())
  params = state.params["student"]
  return params, state.model_state["student"], problem.optimizer.init(params)


def _objective(teacher: Model | None) -> Objective:
  return SUPERVISED if teacher is None else DISTILLED
