"""What `fit` puts on its mesh: the teacher, the train state, the compiled step, the examples of an evaluation."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import data, metrics, reduce
from distill_jax.distributed import sharding
from distill_jax.train.inputs import evaluation_batches
from distill_jax.train.log import pack
from distill_jax.train.step import Step, make_eval_step
from distill_jax.types import Model, TrainState, Variables


def place_teacher(
  teacher: Model | None, given: Variables | None, mesh: Mesh, rules: sharding.Rules
) -> Any:
  """The weights of a frozen teacher, placed; () where there is none, or it follows the student.

  Raises:
    ValueError: there are no weights, or weights that nobody uses.
  """
  if teacher is None or teacher.ema_update is not None:
    if given is not None:
      raise ValueError("teacher_variables were given, but there is no frozen teacher to use them")
    return ()
  variables = given if given is not None else teacher.variables
  if variables is None:
    raise ValueError(
      "the teacher has no weights: pass teacher_variables=, or make the Model from trained weights (an untrained "
      "teacher would teach noise)"
    )
  variables = Variables(*variables)
  if not jax.tree.leaves(variables):  # a cached teacher
    return variables
  return sharding.place(variables, mesh, sharding.specs(variables, mesh, rules))


@contextlib.contextmanager
def init_on_host(mesh: Mesh) -> Iterator[None]:
  """Where parameters are spread over devices, they are made in the host's memory: one device might not hold them."""
  if math.prod(size for axis, size in mesh.shape.items() if axis != "data") == 1:
    yield
  else:
    try:
      host = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
      raise ValueError(
        f"mesh: {dict(mesh.shape)} needs the host's memory to make what is spread, and JAX_PLATFORMS leaves it out: "
        "add ',cpu'"
      ) from error
    with jax.default_device(host):
      yield


def compile_step(step: Step, mesh: Mesh, placement: TrainState):
  """The step, compiled to take host batches: jit places them in a tenth of `device_put`'s time."""

  def packed(state, teacher_variables, batch):
    state, measured = step(state, teacher_variables, batch)
    return state, pack(measured)

  kept = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    placement,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  return jax.jit(
    packed,
    donate_argnums=0,
    in_shardings=(kept, None, sharding.row_sharding(mesh)),
    out_shardings=(kept, sharding.replicated(mesh)),
  )


def evaluator(student: Model, mesh: Mesh, validation, batch_size: int, rows: np.ndarray | None):
  """`variables -> scores` on the whole set; examples in memory are placed once."""
  count = jax.jit(make_eval_step(student), out_shardings=sharding.replicated(mesh))

  def place(batch):
    return sharding.place_rows(batch, mesh, batch_size)

  batches = evaluation_batches(validation, batch_size, rows)
  kept = [place(batch) for batch in batches] if isinstance(validation, data.Source) else None

  def evaluate(variables: Variables) -> dict[str, float]:
    counts = [count(variables, (), batch) for batch in kept or map(place, batches)]
    return metrics.summary(reduce.merge(*jax.device_get(counts)))

  return evaluate


def sparsity_of(state: TrainState) -> dict[str, float]:
  """'sparsity', the share of zeros among the student's weights (arrays of two axes and more), where there are any."""
  zeros, number = map(float, _zeros(state.params["student"]))
  return {"sparsity": zeros / number} if zeros else {}


@jax.jit
def _zeros(params):
  kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
  return sum(jnp.sum(leaf == 0) for leaf in kernels), sum(leaf.size for leaf in kernels)
