"""Checks a run's networks on its first batch, before training."""

import functools

from jax.experimental import multihost_utils

from distill_jax import data
from distill_jax.data.image_checks import check_images
from distill_jax.models.batch_dependencies import entries_read
from distill_jax.models.logits import ROWS, check_logits
from distill_jax.train.arguments import Arguments, Inputs
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
  if teacher is not None and teacher.ema_update is None:
    check_logits("teacher", teacher, inputs.teacher_variables, example)


def check_student_images(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks the images that the student reads, in training and evaluation."""
  student, variables = arguments.student, student_variables(state)
  examples = {"source": inputs.example}
  evaluation = None if arguments.evaluation is None else arguments.evaluation.data
  if isinstance(evaluation, data.Source):
    examples["evaluation"] = {name: x[:1] for name, x in evaluation.arrays.items()}
  elif isinstance(evaluation, data.Pipeline):
    examples["evaluation"] = evaluation.first()

  def apply(variables, batch):
    return student.apply(*variables, batch, train=False, key=None)[0]

  for field, batch in examples.items():
    check_images(batch, functools.partial(entries_read, apply, variables, batch), field)
