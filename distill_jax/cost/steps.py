"""Compiles train steps for chips that this machine may not have."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from distill_jax.cost.analysis import Analysis, Parts
from distill_jax.cost.child import compile_for_tpu
from distill_jax.cost.chips import parse_topology
from distill_jax.cost.compiling import Compiled, Program, compile_on, lower, shapes_of
from distill_jax.cost.parts import lower_parts
from distill_jax.distributed import partition, sharding
from distill_jax.train.options import StepOptions
from distill_jax.train.step import make_init, make_train_step
from distill_jax.types import Batch, Model, Objective, TrainState


def compile_for(
  topology: str,
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  *,
  axes: Mapping[str, int] | None = None,
  rules: partition.Rules = (),
  teacher_rules: partition.Rules = (),
  options: StepOptions = StepOptions(),  # noqa: B008 (frozen)
  parts: bool = False,
) -> Analysis:
  """Compiles the train step for a slice of TPU chips, without a TPU, or for this machine's CPU.

  The compiler is libtpu's own (the extra `tpu`). It runs in another process, so that neither jax
  nor the environment of this one changes.

      print(compile_for("v5e:4x4", student, teacher, objective, optax.adamw(1e-3), batch))

  Args:
    topology: name of the slice, 'v4:2x2x1', 'v5e:4x4', 'v5p:8x8x8', 'v6e:16x16' and so on; or
      'cpu': all CPU devices that jax has here.
    student, teacher, objective, optimizer, options: as in `make_train_step`. Models need no
      weights. Of on-policy generation all memory counts, but the FLOPs of one token only.
    batch: global batch of a step, arrays or `ShapeDtypeStruct`s.
    axes: sizes of the mesh's axes, of which one may be -1 (`sharding.make_mesh`). None: all chips
      along 'data'.
    rules, teacher_rules: rules that split the train state and the teacher, as in `fit`.
    parts: whether to compile the teacher's forward pass and the student's forward and backward pass
      too, to compare; that takes about as long again.

  Raises:
    ValueError: there is no such slice, or these do not fit together: axes and chips, rows and
      chips, arrays and rules, networks.
    ImportError: libtpu is not installed.
    RuntimeError: the compiler failed for another reason than memory.

  >>> import optax
  >>> from distill_jax import cost, losses, models, objectives
  >>> network = models.from_apply(lambda key, x: jnp.zeros((4, 10)), lambda w, x: x @ w, inputs="x")
  >>> objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  >>> batch = {"x": jax.ShapeDtypeStruct((64, 4), jnp.float32)}
  >>> arguments = network, network, objective, optax.sgd(0.1), batch
  >>> analysis = cost.compile_for("cpu", *arguments, parts=True)
  >>> analysis.fits, analysis.parameters, analysis.parts.teacher.flops > 0
  (True, 40, True)
  """
  slice_ = None if topology == "cpu" else parse_topology(topology)
  chips = slice_.size if slice_ else jax.device_count("cpu")
  sizes = sharding.resolve_axis_sizes(axes or {"data": -1}, chips)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
  batch = shapes_of(dict(batch))
  for entry in batch.values():
    sharding.check_divisible(entry.shape[0], mesh, microbatches=options.microbatches)
  arguments = _arguments(student, teacher, objective, optimizer, batch, options.on_policy)
  specs = (
    partition.state_specs(arguments[0], mesh, rules),
    partition.specs(arguments[1], mesh, teacher_rules if arguments[1] else ()),
    sharding.row_spec(mesh),
  )
  lower_for = functools.partial(lower, mesh=mesh, platform="tpu" if slice_ else "cpu")
  step = make_train_step(student, teacher, objective, optimizer, options)
  programs = [lower_for(step, arguments, specs, (specs[0], PartitionSpec()), donate=True)]
  if parts and teacher is not None:
    augmented = jax.eval_shape(functools.partial(_augment, options), arguments[0].key, batch)
    part_arguments = (*arguments[:2], augmented)
    programs += lower_parts(lower_for, student, teacher, objective, part_arguments, specs)
  compiled = _compile(topology, mesh, programs)
  return Analysis(
    topology=topology,
    chip=slice_.chip if slice_ else None,
    axes=sizes,
    items=_items(batch),
    parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(arguments[0].params)),
    sizes={name: _bytes(x) for name, x in zip(("train state", "teacher", "batch"), arguments)},
    step=compiled[0],
    parts=Parts(*compiled[1:]) if len(compiled) > 1 else None,
  )


def _compile(topology: str, mesh: AbstractMesh, programs: Sequence[Program]) -> list[Compiled]:
  if topology != "cpu":
    return compile_for_tpu(topology, dict(mesh.shape), programs)
  devices = jax.devices("cpu")
  device_mesh = jax.make_mesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, devices=devices)
  return [compile_on(program, device_mesh) for program in programs]


def _arguments(
  student, teacher, objective, optimizer, batch, on_policy
) -> tuple[TrainState, Any, Batch]:
  """Returns shapes of the train step's arguments: state, teacher's variables, batch."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  init = make_init(student, teacher, objective, optimizer, on_policy=on_policy)
  state = jax.eval_shape(init, key, batch)
  if teacher is None or teacher.ema_update is not None:
    return state, (), batch
  if teacher.variables is not None:
    return state, shapes_of(teacher.variables), batch
  return state, jax.eval_shape(teacher.init, key, batch), batch


def _augment(options: StepOptions, key: jax.Array, batch: Batch) -> Batch:
  """Returns the batch as the networks see it."""
  batch = options.augment(batch) if options.augment else batch
  return options.mix(key, batch) if options.mix else batch


def _items(batch: Batch) -> tuple[int, str]:
  """Returns number and unit of what a batch contains."""
  if "tokens" in batch:
    return math.prod(batch["tokens"].shape), "tokens"
  rows = next(iter(batch.values())).shape[0]
  return rows, "images" if "image" in batch else "rows"


def _bytes(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
