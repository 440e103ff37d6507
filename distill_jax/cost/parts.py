"""Lowers the halves of a distillation step, which together cost what a step must cost."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from distill_jax import reduce
from distill_jax.cost.compiling import Program
from distill_jax.types import Batch, Model, Objective, Outputs, TrainState


def lower_parts(
  lower: Callable[..., Program],
  student: Model,
  teacher: Model,
  objective: Objective,
  arguments: tuple[TrainState, Any, Any],
  specs: tuple[Any, Any, PartitionSpec],
) -> list[Program]:
  """Returns the teacher's forward pass, and the gradients of student and objective.

  This does not use the train step, whose cost it is compared with.

  Args:
    lower: `compiling.lower` with mesh and platform.
    student, teacher, objective: as in `compile_for`.
    arguments: shapes of the train step's arguments, the batch as the networks see it.
    specs: `PartitionSpec`s of state, teacher's variables and the batch's rows.
  """
  state, teacher_variables, batch = arguments
  state_specs, teacher_specs, rows = specs
  if teacher.ema_update is not None:
    teacher_variables = state.average
    teacher_specs = PartitionSpec()

  def predict(variables, batch) -> Outputs:
    return teacher.apply(*variables, batch, train=False, key=None)[0]

  gradients = functools.partial(_gradients, student, objective)
  outputs = jax.eval_shape(predict, teacher_variables, batch)
  names = _used_names(gradients, state, outputs, batch)

  def predict_used(variables, batch) -> Outputs:
    outputs = predict(variables, batch)
    return {name: outputs[name] for name in names}

  used = {name: outputs[name] for name in names}
  gradient_specs = state_specs if isinstance(state_specs, PartitionSpec) else state_specs.params
  return [
    lower(predict_used, (teacher_variables, batch), (teacher_specs, rows), rows),
    lower(gradients, (state, used, batch), (state_specs, rows, rows), gradient_specs),
  ]


def _gradients(
  student: Model, objective: Objective, state: TrainState, teacher_outputs: Outputs, batch: Batch
) -> Any:
  student_key, objective_key = jax.random.split(state.key)

  def loss(params):
    outputs, _ = student.apply(
      params["student"], state.model_state["student"], batch, train=True, key=student_key
    )
    terms, _ = objective.apply(
      params["objective"],
      state.model_state["objective"],
      outputs,
      teacher_outputs,
      batch,
      step=state.step,
      key=objective_key,
    )
    return sum(w * (reduce.mean(*v) if isinstance(v, tuple) else v) for w, v in terms.values())

  return jax.grad(loss)(state.params)


def _used_names(
  gradients: Callable, state: TrainState, outputs: Outputs, batch: Batch
) -> list[str]:
  """Returns the names of the teacher's outputs that any gradient depends on."""
  jaxpr = jax.make_jaxpr(gradients)(state, outputs, batch).jaxpr
  used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
  start = len(jaxpr.invars) - len(jax.tree.leaves((outputs, batch)))
  leaves, _ = jax.tree_util.tree_flatten_with_path(outputs)
  inputs = jaxpr.invars[start : start + len(leaves)]
  return sorted({path[0].key for (path, _), x in zip(leaves, inputs, strict=True) if id(x) in used})
