"""Checks a run's networks on its first batch, before training."""

from jax.experimental import multihost_utils

from distill_jax import data
from distill_jax.models.image_inputs import check_image_inputs
from distill_jax.models.logits import ROWS, check_logits
from distill_jax.models.networks import input_names
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


def check_run_images(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks the images that student and teacher read, in training and evaluation."""
  student = (arguments.student, student_variables(state))
  models = [student]
  teacher = arguments.teacher
  if teacher is not None and teacher.ema_update is None:
    models.append((teacher, inputs.teacher_variables))
  check_image_inputs("source", models, inputs.example)
  evaluation = None if arguments.evaluation is None else arguments.evaluation.data
  if isinstance(evaluation, data.Source):
    example = {name: x[:1] for name, x in evaluation.arrays.items()}
  elif isinstance(evaluation, data.Pipeline):
    example = evaluation.first()
  else:
    return
  # Without the teacher's inputs it is not evaluated.
  has_inputs = set(input_names(inputs.example)) <= set(example)
  check_image_inputs("evaluation", models if has_inputs else [student], example)
