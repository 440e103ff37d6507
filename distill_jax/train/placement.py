"""Places what `fit` computes with on a mesh: the teacher, the compiled step, the batches of an
evaluation.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import data
from distill_jax.data.label_checks import IgnoreLabel
from distill_jax.distributed import partition, sharding
from distill_jax.train.batch_errors import map_batches
from distill_jax.train.evaluation import Accumulator
from distill_jax.train.inputs import evaluation_batches, fill_up
from distill_jax.train.log import pack
from distill_jax.train.options import Batches
from distill_jax.train.step import Step
from distill_jax.types import Model, Task, TrainState, Variables


def place_teacher(
  teacher: Model | None, variables: Variables | None, mesh: Mesh, rules: partition.Rules
) -> Any:
  """Returns the frozen teacher's weights on the mesh; `()` without a teacher and for an EMA
  teacher.

  Args:
    teacher: the Model.
    variables: its weights; None: those that the Model carries.
    mesh, rules: where they go.

  Raises:
    ValueError: there are no weights, or weights and no frozen teacher.
  """
  if teacher is None or teacher.ema_update is not None:
    if variables is not None:
      raise ValueError(
        "teacher_variables: expected none without a frozen teacher, got some: leave them out"
      )
    return ()
  variables = teacher.variables if variables is None else variables
  if variables is None:
    raise ValueError(
      "teacher_variables: expected the teacher's trained weights, got none: pass them, or build "
      "the Model from trained weights (an untrained teacher would teach noise)"
    )
  variables = Variables(*variables)
  if not jax.tree.leaves(variables):
    return variables  # A cached teacher has no weights: a rule would match nothing and raise.
  return sharding.place(variables, mesh, partition.specs(variables, mesh, rules))


@contextlib.contextmanager
def init_on_host(mesh: Mesh) -> Iterator[None]:
  """Makes parameters in the host's memory where a mesh splits them: one device might not hold them.

  Raises:
    ValueError: JAX_PLATFORMS leaves out the host's backend.
  """
  if math.prod(size for axis, size in mesh.shape.items() if axis != "data") == 1:
    yield
    return
  try:
    host = jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise ValueError(
      f"mesh: {dict(mesh.shape)} needs the host's memory to initialize what it splits, and "
      "JAX_PLATFORMS leaves it out: add ',cpu'"
    ) from error
  with jax.default_device(host):
    yield


def compile_step(step: Step, mesh: Mesh, specs: TrainState) -> Callable:
  """Returns the jitted step, which takes host batches: jit places them in a tenth of `device_put`'s
  time.
  """

  def packed_step(state, teacher_variables, batch):
    state, metrics = step(state, teacher_variables, batch)
    return state, pack(metrics)

  state_shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  return jax.jit(
    packed_step,
    donate_argnums=0,
    in_shardings=(state_shardings, None, sharding.row_sharding(mesh)),
    out_shardings=(state_shardings, sharding.replicated_sharding(mesh)),
  )


def compile_evaluation(
  step: Callable,
  task: Task,
  mesh: Mesh,
  examples: Batches,
  batch_size: int,
  rows: np.ndarray | None,
  *,
  classes: Mapping[str, int | None] | None = None,
  ignore_label: IgnoreLabel = None,
) -> Callable[[Any, Any], dict[str, float]]:
  """Returns `(state, teacher_variables) -> scores` on all examples; those in memory are placed
  once.

  Args:
    step: of `make_eval_step` or `make_terms_step`.
    task: what is measured.
    mesh: where it is computed.
    examples: of the evaluation.
    batch_size: rows of a batch over all devices.
    rows: those of this process; None: all.
    classes: entries with labels of classes, `{entry: number of classes}`; None: unknown.
    ignore_label: of the labels.
  """
  measure = jax.jit(step, out_shardings=sharding.replicated_sharding(mesh))

  def place(batch):
    return sharding.place_rows(_padded(batch, mesh, rows), mesh, batch_size)

  batches = evaluation_batches(
    examples, batch_size, rows, classes=classes, ignore_label=ignore_label
  )
  in_memory = isinstance(examples, data.Source)
  device_batches = [place(batch) for batch in batches()] if in_memory else None

  def evaluate(state, teacher_variables) -> dict[str, float]:
    accumulator = Accumulator(task)
    measure_batch = functools.partial(measure, state, teacher_variables)
    for sums in map_batches(measure_batch, device_batches or map(place, batches()), "evaluation"):
      accumulator.add(*sums)
    return accumulator.result().scores

  return evaluate


def _padded(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: np.ndarray | None):
  """Returns a short batch filled up by its last row under 'where', so that it divides evenly."""
  number = data.count_rows(batch)
  size = sharding.next_divisible(number, mesh) if rows is None else len(rows)
  if number >= size:
    return batch
  return fill_up(batch, size)


def sparsity(state: TrainState) -> dict[str, float]:
  """Returns 'sparsity', the fraction of zeros among the student's weights (arrays of two axes and
  more), if any.
  """
  zeros, size = map(float, _count_zeros(state.params["student"]))
  return {"sparsity": zeros / size} if zeros else {}


@jax.jit
def _count_zeros(params):
  kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
  return sum(jnp.sum(leaf == 0) for leaf in kernels), sum(leaf.size for leaf in kernels)
