"""Train steps compiled for chips that may not be here."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from distill_jax.cost.analysis import Analysis, Parts
from distill_jax.cost.child import compile_for_tpu
from distill_jax.cost.chips import slice_of
from distill_jax.cost.compiling import compile_on, lower, shapes_of
from distill_jax.cost.parts import make_parts
from distill_jax.distributed import sharding
from distill_jax.train import make_init, make_train_step
from distill_jax.train.replay import Replay
from distill_jax.types import Batch, Model, Objective, OnPolicy, TrainState


def compile_for(
  topology: str,
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  *,
  axes: Mapping[str, int] | None = None,
  rules: sharding.Rules = (),
  teacher_rules: sharding.Rules = (),
  microbatches: int = 1,
  augment: Callable[[Batch], Batch] | None = None,
  mix: Callable[[jax.Array, Batch], Batch] | None = None,
  on_policy: OnPolicy | Replay | None = None,
  parts: bool = False,
) -> Analysis:
  """Compiles the train step for a slice of TPU chips, on a machine that needs none, or for this machine's CPU.

  The compiler is libtpu's own (the extra `tpu`). It runs in another process, so that neither jax nor the environment
  of this one is touched.

      print(compile_for("v5e:4x4", student, teacher, objective, optax.adamw(1e-3), batch))

  Args:
    topology: 'v4:2x2x1', 'v5e:4x4', 'v5p:8x8x8', 'v6e:16x16' and so on; or 'cpu', all CPU devices that jax has here.
    student, teacher, objective, optimizer, microbatches, augment, mix, on_policy: as in `make_train_step`. Models
      need no weights. Of what the student samples on policy all memory counts, but the FLOPs of one token only.
    batch: of a whole step, arrays or `ShapeDtypeStruct`s.
    axes: of the mesh, with their sizes, of which one may be -1: what is left (`sharding.make_mesh`). None: all chips
      along 'data'.
    rules, teacher_rules: where the arrays of the train state, and of the teacher, lie, as in `fit`.
    parts: compile the teacher's forward pass and the student's forward and backward pass as well, to compare; that
      takes about as long again.

  Raises:
    ValueError: there is no such slice, or things do not fit together: axes and chips, rows and chips, arrays and
      rules, networks.
    ImportError: libtpu is not installed.
    RuntimeError: the compiler failed for another reason than memory.
  """
  here = jax.devices("cpu") if topology == "cpu" else None
  slice_ = None if here else slice_of(topology)
  sizes = sharding.resolve_axis_sizes(
    axes or {"data": -1}, slice_.size if slice_ else jax.device_count("cpu")
  )
  mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
  batch = shapes_of(dict(batch))
  for entry in batch.values():
    sharding.check_divisible(entry.shape[0], mesh, microbatches=microbatches)
  arguments = _arguments(student, teacher, objective, optimizer, batch, on_policy)
  specs = (
    sharding.state_specs(arguments[0], mesh, rules),
    sharding.specs(arguments[1], mesh, teacher_rules if arguments[1] else ()),
    sharding.row_spec(mesh),
  )
  make = functools.partial(lower, mesh=mesh, platform="cpu" if here else "tpu")
  step = make_train_step(
    student,
    teacher,
    objective,
    optimizer,
    microbatches=microbatches,
    augment=augment,
    mix=mix,
    on_policy=on_policy,
  )
  programs = [make(step, arguments, specs, (specs[0], PartitionSpec()), donate=True)]
  if parts and teacher is not None:
    seen = jax.eval_shape(functools.partial(_seen, augment, mix), arguments[0].key, batch)
    programs += make_parts(make, student, teacher, objective, (*arguments[:2], seen), specs)
  if here:
    made = jax.make_mesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, devices=here)
    compiled = [compile_on(program, made) for program in programs]
  else:
    compiled = compile_for_tpu(topology, sizes, programs)
  return Analysis(
    topology,
    slice_.chip if slice_ else None,
    sizes,
    _items(batch),
    sum(math.prod(x.shape) for x in jax.tree.leaves(arguments[0].params)),
    {name: _bytes(tree) for name, tree in zip(("train state", "teacher", "batch"), arguments)},
    compiled[0],
    Parts(*compiled[1:]) if len(compiled) > 1 else None,
  )


def _arguments(
  student, teacher, objective, optimizer, batch, on_policy
) -> tuple[TrainState, Any, Batch]:
  """Shapes of the train step's arguments."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  init = make_init(student, teacher, objective, optimizer, on_policy=on_policy)
  state = jax.eval_shape(init, key, batch)
  if teacher is None or teacher.ema_update is not None:
    return state, (), batch
  if teacher.variables is not None:
    return state, shapes_of(teacher.variables), batch
  return state, jax.eval_shape(teacher.init, key, batch), batch


def _seen(augment, mix, key, batch: Batch) -> Batch:
  """The batch as the networks see it."""
  batch = augment(batch) if augment else batch
  return mix(key, batch) if mix else batch


def _items(batch: Batch) -> tuple[int, str]:
  if "tokens" in batch:
    return math.prod(batch["tokens"].shape), "tokens"
  rows = next(iter(batch.values())).shape[0]
  return rows, "images" if "image" in batch else "rows"


def _bytes(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
