"""Programs that are lowered in one process and may be compiled in another, and what compiling them shows."""

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
# "the total memory required for HLO temporaries (74.53G) exceeds available HBM (15.75G)"; "Used 28.7G of 15.7G hbm"
_REFUSALS = (
  rf"required[^(]*\({_MEASURE}\) exceeds available[^(]*\({_MEASURE}\)",
  rf"Used {_MEASURE} of {_MEASURE}",
)


class Program(NamedTuple):
  """A function of flat arguments, lowered for a platform and a mesh.

  Attributes:
    exported: what `jax.export` serializes.
    donated: how many of its arguments, from the first, are donated.
    products: FLOPs of its matrix products and convolutions, over all devices (`product_flops`).
  """

  exported: bytes
  donated: int
  products: float


class Memory(NamedTuple):
  """Bytes on one device.

  Attributes:
    arguments, outputs: of which `aliased` bytes are the same, donated.
    temporaries: at their peak.
    code: the program itself.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int


class Compiled(NamedTuple):
  """What a compiled program costs on one device each time it runs.

  Attributes:
    seconds: it took to compile.
    needed: bytes of memory.
    available: bytes of memory that the compiler says there are; None: it said nothing.
    memory: what the needed bytes are for; None, as all that follows, where the compiler refused the program because
      it does not fit.
    flops: as XLA counts them: those in a loop once.
    accessed: bytes read and written, as XLA counts them: also between memories of the chip.
    collectives, loops: from the text of the program.
    products: FLOPs of matrix products and convolutions before compilation, in a loop as often as it runs, spread evenly
      over the devices.
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
  """The program of `function(*arguments)`; nothing is computed, and no device is needed.

  Args:
    function: pure, of trees of arrays.
    arguments: trees of arrays or `ShapeDtypeStruct`s.
    specs: for each argument a tree of `PartitionSpec`s, each for a leaf or for a whole branch.
    out_specs: the same for what the function returns.
    mesh: the axes that the specs name.
    platform: 'tpu', 'cpu' ...
    donate: the first argument is donated.
  """
  leaves, structure = jax.tree.flatten(tuple(arguments))

  # Flat, because a serialized program knows no named tuples.
  def flat(*leaves):
    return tuple(jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves))))

  def shardings(specs, tree):
    return tuple(
      NamedSharding(mesh, spec) for spec in jax.tree.leaves(jax.tree.broadcast(specs, tree))
    )

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
  """Compiles a program for the devices of a mesh, which may be descriptions of devices.

  The mesh has the axes that the program was lowered for.
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
    needed, available = refusal(str(error))
    return Compiled(time.time() - start, needed, available)
  seconds, text = time.time() - start, compiled.as_text() or ""
  stats: Any = compiled.memory_analysis()
  memory = Memory(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes,
    stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
  )
  needed = memory.arguments + memory.outputs - memory.aliased + memory.temporaries + memory.code
  cost: Any = compiled.cost_analysis() or {}
  counted = cost.get("flops"), cost.get("bytes accessed")
  products = program.products / mesh.size
  return Compiled(seconds, needed, None, memory, *counted, collectives(text), loops(text), products)


def refusal(message: str) -> tuple[int, int]:
  """(bytes needed, bytes available) from a compiler's message that a program does not fit.

  Raises:
    RuntimeError: it says something else.
  """
  for pattern in _REFUSALS:
    found = re.search(pattern, message)
    if found and "RESOURCE_EXHAUSTED" in message:
      sizes = found.groups()
      return tuple(int(float(n) * _UNITS[unit]) for n, unit in zip(sizes[::2], sizes[1::2]))  # type: ignore[return-value]
  raise RuntimeError(f"the compiler failed: {message}")


def shapes_of(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def plain(compiled: Compiled) -> dict[str, Any]:
  """What json can hold."""
  return {**compiled._asdict(), "memory": compiled.memory and compiled.memory._asdict()}


def from_plain(values: Mapping[str, Any]) -> Compiled:
  """The inverse of `plain`."""
  memory = values["memory"]
  return Compiled(**values)._replace(
    memory=None if memory is None else Memory(**memory),
    collectives=tuple(Collective(*c) for c in values["collectives"]),
    loops=tuple(Loop(*loop) for loop in values["loops"]),
  )
