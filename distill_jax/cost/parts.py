"""The halves of a distillation step, apart: what a step without waste costs."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from distill_jax import reduce
from distill_jax.cost.compiling import Program
from distill_jax.types import Model, Objective, Outputs, TrainState


def make_parts(
  make: Callable[..., Program],
  student: Model,
  teacher: Model,
  objective: Objective,
  arguments: tuple[TrainState, Any, Any],
  specs: tuple[Any, Any, PartitionSpec],
) -> list[Program]:
  """The teacher's forward pass; and the gradients of student and objective, the teacher's outputs given.

  Written without the train step, of which they are the measure.

  Args:
    make: `lower`, given mesh and platform.
    arguments: shapes of the train step's arguments, the batch as the networks see it.
    specs: where they lie; the batch's rows.
  """
  state, frozen, batch = arguments
  placed_state, placed_teacher, rows = specs
  if teacher.ema_update is not None:
    frozen, placed_teacher = state.average, PartitionSpec()

  def teach(variables, batch) -> Outputs:
    return teacher.apply(*variables, batch, train=False, key=None)[0]

  def differentiate(state, teacher_outputs, batch):
    keys = jax.random.split(state.key)

    def loss(params):
      outputs, _ = student.apply(
        params["student"], state.model_state["student"], batch, train=True, key=keys[0]
      )
      learned = params["objective"], state.model_state["objective"]
      terms, _ = objective.apply(
        *learned, outputs, teacher_outputs, batch, step=state.step, key=keys[1], axis_name=None
      )
      return sum(w * (reduce.mean(*v) if isinstance(v, tuple) else v) for w, v in terms.values())

    return jax.grad(loss)(state.params)

  teacher_outputs = jax.eval_shape(teach, frozen, batch)
  used = _used(differentiate, state, teacher_outputs, batch)
  gradients = placed_state if isinstance(placed_state, PartitionSpec) else placed_state.params
  return [
    make(
      lambda v, b: {n: teach(v, b)[n] for n in used}, (frozen, batch), (placed_teacher, rows), rows
    ),
    make(
      differentiate,
      (state, {n: teacher_outputs[n] for n in used}, batch),
      (placed_state, rows, rows),
      gradients,
    ),
  ]


def _used(differentiate, state, teacher_outputs: Outputs, batch) -> list[str]:
  """The names of the teacher's outputs that anything depends on."""
  jaxpr = jax.make_jaxpr(differentiate)(state, teacher_outputs, batch).jaxpr
  read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
  before = len(jax.tree.leaves(state))
  given = jaxpr.invars[before : before + len(jax.tree.leaves(teacher_outputs))]
  flat, _ = jax.tree_util.tree_flatten_with_path(teacher_outputs)
  return sorted({path[0].key for (path, _), v in zip(flat, given) if id(v) in read})
