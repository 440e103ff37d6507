"""Checks a run's networks on its first batch, before training."""

import warnings

import jax
from jax.experimental import multihost_utils

from distill_jax import data
from distill_jax.cache import Dense
from distill_jax.cache.codecs.codec import output_of
from distill_jax.data.leaks import (
  check_no_shared_cases,
  check_no_shared_groups,
  warn_of_shared_examples,
)
from distill_jax.models.image_inputs import check_image_inputs
from distill_jax.models.logits import ROWS, check_logits
from distill_jax.models.networks import input_names
from distill_jax.train.arguments import Arguments, Inputs
from distill_jax.train.loss_fn import apply_teacher, make_loss_of_outputs
from distill_jax.train.placement import init_on_host
from distill_jax.types import TrainState, Variables


def student_variables(state: TrainState) -> Variables:
  """Returns the student's variables in a train state."""
  return Variables(state.params["student"], state.model_state["student"])


def check_run_logits(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks on rows of the first batch that logits are no probabilities."""
  teacher, mesh = arguments.teacher, inputs.mesh
  # A network may split its rows over the mesh.
  example = {name: x[: ROWS * mesh.size] for name, x in inputs.example.items()}
  if inputs.rows is not None:
    example = multihost_utils.broadcast_one_to_all(example)  # Each process has rows of its own.
  with init_on_host(mesh):
    check_logits("student", arguments.student, student_variables(state), example)
  _check_cached_classes(arguments, inputs, state)
  if teacher is not None and teacher.ema_update is None:
    check_logits("teacher", teacher, inputs.teacher_variables, example)


def check_run_images(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks images in training and evaluation, and that no group of examples is in both.

  Examples that are in both warn.
  """
  student = (arguments.student, student_variables(state))
  models = [student]
  teacher = arguments.teacher
  if teacher is not None and teacher.ema_update is None:
    models.append((teacher, inputs.teacher_variables))
  check_image_inputs("source", models, inputs.example)
  evaluation = None if arguments.evaluation is None else arguments.evaluation.data
  check_no_shared_groups(arguments.source, evaluation)
  if arguments.task is not None:
    check_no_shared_cases(arguments.source, evaluation, arguments.task.groups)
  if isinstance(evaluation, data.Source):
    if isinstance(arguments.source, data.Source):
      warn_of_shared_examples(arguments.source, evaluation)
    example = {name: x[:1] for name, x in evaluation.arrays.items()}
  elif isinstance(evaluation, data.Pipeline):
    example = evaluation.first()
  else:
    return
  # Without the teacher's inputs it is not evaluated.
  has_inputs = set(input_names(inputs.example)) <= set(example)
  check_image_inputs("evaluation", models if has_inputs else [student], example)


def warn_of_unread_teacher(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Warns if no term of the objective reads an output of the teacher."""
  teacher, teacher_variables = arguments.teacher, inputs.teacher_variables
  if teacher is None:
    return
  if teacher.ema_update is not None:
    teacher_variables = state.average
  outputs = jax.eval_shape(
    lambda variables, batch: dict(apply_teacher(teacher, variables, batch)),
    teacher_variables,
    inputs.example,
  )
  loss_of_outputs = make_loss_of_outputs(arguments.student, arguments.objective)

  def loss(outputs, params, batch):
    keys = (state.key, state.key)
    return loss_of_outputs(params, state.model_state, outputs, batch, step=state.step, keys=keys)[0]

  jaxpr = jax.make_jaxpr(loss)(outputs, state.params, inputs.example).jaxpr
  teacher_inputs = set(jaxpr.invars[: len(jax.tree.leaves(outputs))])
  read = {id(x) for equation in jaxpr.eqns for x in equation.invars}
  if not any(id(x) in read for x in teacher_inputs):
    warnings.warn(
      f"teacher: expected a term that reads its outputs {sorted(outputs)}, got none in the "
      "objective, so that nothing is distilled: add soft=(1.0, objectives.logits("
      "losses.kl_divergence)), or pass teacher=None",
      stacklevel=2,
    )


def _check_cached_classes(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks that the indices of a cache are classes of the student."""
  if arguments.cache is None:
    return
  outputs = jax.eval_shape(
    lambda variables, batch: arguments.student.apply(*variables, batch, train=False, key=None)[0],
    student_variables(state),
    inputs.example,
  )
  for name, (codec, stored) in arguments.cache.outputs.items():
    own = outputs.get(output_of(name))
    if isinstance(codec, Dense) or own is None or own.shape[-1] == stored.shape[-1]:
      continue
    raise ValueError(
      f"cache: expected {own.shape[-1]} classes in {name!r}, those of the student, got "
      f"{stored.shape[-1]} of the teacher: give the student as many"
    )
