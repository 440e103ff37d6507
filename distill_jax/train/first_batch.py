"""Checks a run's networks on its first batch, before training."""

import warnings

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from distill_jax import data
from distill_jax.cache import Codes, Dense
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
from distill_jax.types import CACHED, Batch, Outputs, TrainState, Variables

_MAX_DIFFERENCE = 0.05
"""Relative difference, by their norms, that a bfloat16 teacher or a cache of 8 bits may make."""


def student_variables(state: TrainState) -> Variables:
  """Returns the student's variables in a train state."""
  return Variables(state.params["student"], state.model_state["student"])


def check_run_outputs(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks on rows of the first batch that logits are no probabilities, and that the student has
  the first layers that it shares with the teacher.
  """
  teacher, mesh = arguments.teacher, inputs.mesh
  example = _first_rows(inputs)
  with init_on_host(mesh):
    check_logits("student", arguments.student, student_variables(state), example)
  _check_cached_classes(arguments, inputs, state)
  if teacher is not None and teacher.ema_update is None:
    check_logits("teacher", teacher, inputs.teacher_variables, example)
    _check_shared_outputs(arguments, inputs, state, example)


def _first_rows(inputs: Inputs) -> Batch:
  """Returns rows of the first batch, the same in each process."""
  # A network may split its rows over the mesh.
  example = {name: x[: ROWS * inputs.mesh.size] for name, x in inputs.example.items()}
  if inputs.rows is not None:
    example = multihost_utils.broadcast_one_to_all(example)  # Each process has rows of its own.
  return example


def _check_shared_outputs(
  arguments: Arguments, inputs: Inputs, state: TrainState, example: Batch
) -> None:
  """Checks on rows of the first batch that the student computes by itself what it reads of the
  teacher in training: else it would be evaluated with other inputs than it was trained on.

  Raises:
    ValueError: a live teacher lacks such an output, or it differs from the student's.
  """
  student, teacher = arguments.student, arguments.teacher
  if not student.reads:
    return
  own_inputs = {name: x for name, x in example.items() if not name.startswith(CACHED)}

  @jax.jit
  def differences(variables, teacher_variables):
    own = student.apply(*variables, own_inputs, train=False, key=None)[0]
    given = apply_teacher(teacher, teacher_variables, example)
    names = [name for name in student.reads if name in given]
    return {name: _relative_difference(own[name], given[name]) for name in names}

  found = jax.device_get(differences(student_variables(state), inputs.teacher_variables))
  missing = [name for name in student.reads if name not in found]
  if missing and arguments.cache is None:
    raise ValueError(
      f"teacher: expected the outputs {list(student.reads)} that the student reads, got none of "
      f"{missing}: return them, or name them in shared_prefix(outputs=...)"
    )
  for name, difference in found.items():
    if not difference < _MAX_DIFFERENCE:
      raise ValueError(
        f"teacher: expected the student's own {name!r}, which it reads in training, got values "
        f"that differ by {difference:.2g} of their norm: pass the teacher of shared_prefix, with "
        "the same weights, and a student that has its first layers"
      )


def _relative_difference(x: jax.Array, reference: jax.Array) -> jax.Array:
  """Returns the norm of the difference over that of the reference; NaN in both is equal."""
  if x.shape != reference.shape:
    return jnp.array(jnp.inf)
  equal = jnp.isnan(x) & jnp.isnan(reference)
  difference = jnp.where(equal, 0, x - reference)
  norm = jnp.linalg.norm(jnp.where(equal, 0, reference).ravel())
  return jnp.linalg.norm(difference.ravel()) / jnp.maximum(norm, 1e-30)


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
  # First layers that the student shares with the teacher distill nothing.
  student = arguments.student._replace(reads=())
  loss_of_outputs = make_loss_of_outputs(student, arguments.objective)

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
    if isinstance(codec, Dense | Codes):
      continue
    own = _count_classes(outputs, output_of(name))
    if own in (None, stored.shape[-1]):
      continue
    raise ValueError(
      f"cache: expected {own} classes in {name!r}, those of the student, got {stored.shape[-1]} of "
      "the teacher: give the student as many, or train it on the teacher's text (cache.seq_kd)"
    )


def _count_classes(outputs: Outputs, name: str) -> int | None:
  """Returns the number of classes of an output; None: it is missing."""
  if name not in outputs and name == "logits" and "head" in outputs:
    return outputs["head"][0].shape[1]
  return outputs[name].shape[-1] if name in outputs else None
