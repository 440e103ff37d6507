"""Lowers programs in one process, compiles them in the same or another, and reads their costs."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from distill_jax.cost.chips import GIB
from distill_jax.cost.flops import product_flops
from distill_jax.cost.hlo import Collective, Loop, collectives, loops
from distill_jax.distributed.platform import tracing_for

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_MEASURE = r"([\d.]+)([KMGTB]?)"
# "the total memory required for HLO temporaries (74.53G) exceeds available HBM (15.75G)"; "Used
# 28.7G of 15.7G hbm"
_MEMORY_ERRORS = (
  rf"required[^(]*\({_MEASURE}\) exceeds available[^(]*\({_MEASURE}\)",
  rf"Used {_MEASURE} of {_MEASURE}",
)


class Program(NamedTuple):
  """A function of flat arguments, lowered for a platform and a mesh.

  Attributes:
    exported: the function as `jax.export` serializes it.
    donated: number of its arguments, from the first, that are donated.
    products: FLOPs of its matrix products and convolutions, over all devices (`product_flops`).
  """

  exported: bytes
  donated: int
  products: float


class Memory(NamedTuple):
  """The memory of a program on one device, in bytes.

  Attributes:
    arguments: arguments, including the donated ones.
    outputs: results, including those that reuse donated arguments.
    aliased: donated arguments that results reuse.
    temporaries: intermediate arrays at their peak.
    code: the program itself.

  Example in `compile_for`.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int


class Compiled(NamedTuple):
  """The cost of a compiled program on one device each time it runs.

  Attributes:
    seconds: time of the compilation.
    needed: bytes of memory that the program needs.
    available: bytes of memory that the compiler reports as available; None: it reports nothing.
    memory: what the needed bytes are for; None, like all that follow, if the compiler rejected the
      program because it does not fit.
    flops: FLOPs by XLA's count, those in a loop once.
    accessed: bytes read and written by XLA's count, also between memories of the chip.
    collectives, loops: contents of the program's text.
    products: FLOPs of matrix products and convolutions before compilation, in a loop as often as it
      runs, divided by the number of devices.

  Example in `compile_for`.
  """

  seconds: float
  needed: int
  available: int | None = None
  memory: Memory | None = None
  flops: float | None = None
  accessed: float | None = None
  collectives: tuple[Collective, ...] = ()
  loops: tuple[Loop, ...] = ()
  products: float | None = None


def lower(
  function: Callable[..., Any],
  arguments: Sequence[Any],
  specs: Sequence[Any],
  out_specs: Any,
  mesh: AbstractMesh,
  platform: str,
  *,
  donate: bool = False,
) -> Program:
  """Returns the program of `function(*arguments)`; nothing is computed, and no device is needed.

  Args:
    function: pure function of trees of arrays.
    arguments: trees of arrays or `ShapeDtypeStruct`s.
    specs: for each argument a tree of `PartitionSpec`s, each for a leaf or for a branch.
    out_specs: the same for the results.
    mesh: mesh with the axes that the specs name.
    platform: 'tpu', 'cpu' ...
    donate: whether the first argument is donated.
  """
  leaves, structure = jax.tree.flatten(tuple(arguments))

  # Flat, because a serialized program has no named tuples.
  def flat(*leaves):
    return tuple(jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves))))

  def shardings(specs, tree):
    leaf_specs = jax.tree.leaves(jax.tree.broadcast(specs, tree))
    return tuple(NamedSharding(mesh, spec) for spec in leaf_specs)

  with tracing_for(platform):
    outputs = jax.eval_shape(function, *arguments)
    jitted = jax.jit(
      flat,
      in_shardings=shardings(tuple(specs), tuple(arguments)),
      out_shardings=shardings(out_specs, outputs),
    )
    products = product_flops(jitted.trace(*leaves).jaxpr)
    exported = jax.export.export(jitted, platforms=[platform])(*leaves)
  donated = len(jax.tree.leaves(arguments[0])) if donate else 0
  return Program(bytes(exported.serialize()), donated, products)


def compile_on(program: Program, mesh: Mesh) -> Compiled:
  """Compiles a program, which may have been lowered in another process.

  Args:
    program: program of `lower`.
    mesh: devices, or descriptions of them, with the axes that the program was lowered for.

  Raises:
    RuntimeError: the compiler failed for another reason than memory.
  """
  exported = jax.export.deserialize(bytearray(program.exported))
  jitted = jax.jit(
    exported.call,
    in_shardings=exported.in_shardings_jax(mesh),
    out_shardings=exported.out_shardings_jax(mesh),
    donate_argnums=tuple(range(program.donated)),
  )
  lowered = jitted.lower(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals))
  start = time.time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed, available = parse_memory_error(str(error))
    return Compiled(time.time() - start, needed, available)
  seconds = time.time() - start
  text = compiled.as_text() or ""
  memory = _memory_of(compiled)
  cost: Any = compiled.cost_analysis() or {}
  return Compiled(
    seconds=seconds,
    needed=memory.arguments + memory.outputs - memory.aliased + memory.temporaries + memory.code,
    memory=memory,
    flops=cost.get("flops"),
    accessed=cost.get("bytes accessed"),
    collectives=collectives(text),
    loops=loops(text),
    products=program.products / mesh.size,
  )


def parse_memory_error(message: str) -> tuple[int, int]:
  """Returns (bytes needed, bytes available) from a compiler's message that a program does not fit.

  Raises:
    RuntimeError: the message is about something else.
  """
  for pattern in _MEMORY_ERRORS:
    match = re.search(pattern, message)
    if match and "RESOURCE_EXHAUSTED" in message:
      needed, needed_unit, available, available_unit = match.groups()
      return _bytes(needed, needed_unit), _bytes(available, available_unit)
  raise RuntimeError(f"the compiler failed: {message}")


def shapes_of(tree: Any) -> Any:
  """Returns the tree with a `ShapeDtypeStruct` instead of each array."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def to_json(compiled: Compiled) -> dict[str, Any]:
  """Returns the cost of a program as values that json can hold."""
  return {**compiled._asdict(), "memory": compiled.memory and compiled.memory._asdict()}


def from_json(values: Mapping[str, Any]) -> Compiled:
  """Returns the cost of a program from the values of `to_json`."""
  memory = values["memory"]
  return Compiled(**values)._replace(
    memory=None if memory is None else Memory(**memory),
    collectives=tuple(Collective(*collective) for collective in values["collectives"]),
    loops=tuple(Loop(*loop) for loop in values["loops"]),
  )


def _memory_of(compiled: Any) -> Memory:
  stats = compiled.memory_analysis()
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )


def _bytes(number: str, unit: str) -> int:
  return int(float(number) * _UNITS[unit])
