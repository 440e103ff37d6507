"""Train steps compiled for chips that may not be here."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from distill_jax.ahead.analysis import Analysis, Parts
from distill_jax.ahead.child import compile_for_tpu
from distill_jax.ahead.chips import slice_of
from distill_jax.ahead.compiling import compile_on, lower, shapes_of
from distill_jax.ahead.parts import make_parts
from distill_jax.train import make_init, make_train_step
from distill_jax.types import Batch, Model, Objective, TrainState

P = PartitionSpec
Placement = Callable[[AbstractMesh, tuple[Any, Any, Any]], Sequence[Any]]
"""`(mesh, (train state, teacher's variables, batch)) -> PartitionSpecs` of the three: trees, or one for a branch."""


def compile_for(
  topology: str,
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  *,
  axes: Mapping[str, int] | None = None,
  placement: Placement | None = None,
  microbatches: int = 1,
  augment: Callable[[Batch], Batch] | None = None,
  mix: Callable[[jax.Array, Batch], Batch] | None = None,
  parts: bool = False,
) -> Analysis:
  """Compiles the train step for a slice of TPU chips, on a machine that needs none, or for this machine's CPU.

  The compiler is libtpu's own (the extra `tpu`). It runs in another process, so that neither jax nor the environment
  of this one is touched.

      print(compile_for("v5e:4x4", student, teacher, objective, optax.adamw(1e-3), batch))

  Args:
    topology: 'v4:2x2x1', 'v5e:4x4', 'v5p:8x8x8', 'v6e:16x16' and so on; or 'cpu', all CPU devices that jax has here.
    student, teacher, objective, optimizer, microbatches, augment, mix: as in `make_train_step`. Models need no
      weights.
    batch: of a whole step, arrays or `ShapeDtypeStruct`s.
    axes: of the mesh, with their sizes, of which one may be -1: what is left. None: all chips along 'data'.
    placement: where arrays lie. None: the batch's rows over all axes but 'tensor', all else on every chip.
    parts: compile the teacher's forward pass and the student's forward and backward pass as well, to compare; that
      takes about as long again.

  Raises:
    ValueError: there is no such slice, or things do not fit together: axes and chips, rows and chips, networks.
    ImportError: libtpu is not installed.
    RuntimeError: the compiler failed for another reason than memory.
  """
  here = jax.devices("cpu") if topology == "cpu" else None
  slice_ = None if here else slice_of(topology)
  sizes = _filled(axes or {"data": -1}, slice_.size if slice_ else jax.device_count("cpu"), topology)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
  batch = shapes_of(dict(batch))
  arguments = _arguments(student, teacher, objective, optimizer, batch)
  specs = tuple((placement or _replicated)(mesh, arguments))
  _check_rows(batch, specs[2], sizes, microbatches)
  make = functools.partial(lower, mesh=mesh, platform="cpu" if here else "tpu")
  step = make_train_step(
    student, teacher, objective, optimizer, microbatches=microbatches, augment=augment, mix=mix
  )
  programs = [make(step, arguments, specs, (specs[0], P()), donate=True)]
  if parts and teacher is not None:
    seen = jax.eval_shape(functools.partial(_seen, augment, mix), arguments[0].key, batch)
    programs += make_parts(
      make, student, teacher, objective, (*arguments[:2], seen), (*specs[:2], _rows(mesh))
    )
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


def _arguments(student, teacher, objective, optimizer, batch) -> tuple[TrainState, Any, Batch]:
  """Shapes of the train step's arguments."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(make_init(student, teacher, objective, optimizer), key, batch)
  if teacher is None or teacher.follow is not None:
    return state, (), batch
  if teacher.variables is not None:
    return state, shapes_of(teacher.variables), batch
  return state, jax.eval_shape(teacher.init, key, batch), batch


def _seen(augment, mix, key, batch: Batch) -> Batch:
  """The batch as the networks see it."""
  batch = augment(batch) if augment else batch
  return mix(key, batch) if mix else batch


def _rows(mesh: AbstractMesh) -> PartitionSpec:
  return P(tuple(name for name in mesh.axis_names if name != "tensor"))


def _replicated(mesh: AbstractMesh, arguments):
  del arguments
  return P(), P(), _rows(mesh)


def _filled(axes: Mapping[str, int], chips: int, topology: str) -> dict[str, int]:
  """The sizes of the axes, -1 replaced by what is left."""
  left = [name for name, size in axes.items() if size == -1]
  given = math.prod(size for size in axes.values() if size != -1)
  if len(left) > 1 or any(size < 1 and size != -1 for size in axes.values()):
    raise ValueError(f"axes: expected sizes >= 1, and -1 at most once, got {dict(axes)}")
  if chips % given or (not left and given != chips):
    near = [size for size in range(1, chips + 1) if chips % size == 0]
    raise ValueError(
      f"axes: {dict(axes)} do not fit the {chips} chips of {topology}: the product of the sizes must be {chips}; "
      f"sizes that divide it: {near}"
    )
  return {name: chips // given if size == -1 else size for name, size in axes.items()}


def _check_rows(batch: Batch, specs, sizes: Mapping[str, int], microbatches: int) -> None:
  for name, spec in jax.tree.broadcast(specs, dict(batch)).items():
    axes = (spec[0] if len(spec) else None) or ()
    parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes)) * microbatches
    rows = batch[name].shape[0]
    if rows % parts:
      down = rows // parts * parts
      near = f"{down} or {down + parts}" if down else f"{parts}"
      raise ValueError(
        f"batch {name!r} of {rows} rows does not divide over {parts // microbatches} chips x {microbatches} "
        f"microbatches; nearest: {near}"
      )


def _items(batch: Batch) -> tuple[int, str]:
  if "tokens" in batch:
    return math.prod(batch["tokens"].shape), "tokens"
  rows = next(iter(batch.values())).shape[0]
  return rows, "images" if "image" in batch else "rows"


def _bytes(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
