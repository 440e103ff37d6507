"""Parses communication and loops from the text of a compiled program.

`compiled.as_text()` is XLA's optimized HLO for one device: computations, one after the other, each
a list of `%name = type opcode(operands), attributes`.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "reduce-scatter",
  "all-gather",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<= ]*)\]")
_CALLS = re.compile(
  r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)"
)
_CALL_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


class Collective(NamedTuple):
  """Communication of one kind, over groups of one size, of arrays of one type.

  Attributes:
    kind: 'all-reduce', 'reduce-scatter', 'all-gather' ...
    dtype: dtype of the arrays, 'bf16'; several as 'bf16+f32'.
    group: number of devices that communicate.
    calls: calls per execution of the program, those in loops once for each trip.
    bytes: bytes of the full arrays per execution: the input of an all-reduce or a reduce-scatter on
      each device, or the output of an all-gather. How many cross a link depends on the algorithm.
    exact: False if some calls are in a loop of unknown length, of which one trip is counted.

  >>> from distill_jax.cost import Collective
  >>> gradients = Collective("all-reduce", "f32", group=16, calls=2, bytes=4_000_000, exact=True)
  >>> gradients.bytes / gradients.calls
  2000000.0
  """

  kind: str
  dtype: str
  group: int
  calls: int
  bytes: int
  exact: bool


class Loop(NamedTuple):
  """A `while` loop.

  Attributes:
    trips: number of times its body runs in each execution; None: unknown.
    products: number of convolutions and matrix products in its body. XLA's cost analysis counts the
      FLOPs of one trip.

  >>> from distill_jax.cost import hlo
  >>> program = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, x: x @ x, x))
  >>> hlo.loops(program.lower(jnp.eye(2)).compile().as_text())
  (Loop(trips=5, products=1),)
  """

  trips: int | None
  products: int


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  rest: str


class _Program(NamedTuple):
  computations: dict[str, list[_Instruction]]
  entry: str
  devices: int


class _Use(NamedTuple):
  """The number of times that a computation runs per execution of the program."""

  times: int
  exact: bool


def collectives(text: str) -> tuple[Collective, ...]:
  """Returns the communication in the text of a compiled program, largest first.

  Raises:
    ValueError: it is no text of a compiled program.
  """
  program = _parse(text)
  sums: dict[tuple[str, str, int], Collective] = {}
  # An asynchronous one that is fused with other work is in several computations, under one channel.
  channels: set[tuple[str, str]] = set()
  for computation, use in _uses(program).items():
    for instruction in program.computations[computation]:
      kind = instruction.opcode.removesuffix("-start")
      if kind not in KINDS or not use.times:
        continue
      channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
      if channel:
        if (kind, channel[1]) in channels:
          continue
        channels.add((kind, channel[1]))
      collective = _collective(computation, instruction, kind, program.devices)
      key = collective.kind, collective.dtype, collective.group
      old = sums.get(key, Collective(*key, 0, 0, True))
      sums[key] = old._replace(
        calls=old.calls + use.times,
        bytes=old.bytes + use.times * collective.bytes,
        exact=old.exact and use.exact,
      )
  return tuple(sorted(sums.values(), key=lambda c: -c.bytes))


def loops(text: str) -> tuple[Loop, ...]:
  """Returns the `while` loops in the text of a compiled program, including those inside others.

  Raises:
    ValueError: it is no text of a compiled program.
  """
  program = _parse(text)
  result = []
  for computation in _uses(program):
    for instruction in program.computations[computation]:
      if instruction.opcode == "while":
        body = _reachable(program, _called(instruction)["body"])
        instructions = [i for name in body for i in program.computations[name]]
        products = sum(map(_is_product, instructions))
        result.append(Loop(_trips(program, instruction), products))
  return tuple(result)


def _collective(computation: str, instruction: _Instruction, kind: str, devices: int) -> Collective:
  arrays = list(_arrays(instruction.type))
  if instruction.opcode.endswith("-start") and kind != "all-reduce":
    # Without the contexts, the first half are operands and the second half results.
    arrays = [array for array in arrays if array != ("u32", 4)]
    half = len(arrays) // 2
    arrays = arrays[:half] if kind == "collective-permute" else arrays[half:]
  group = _group(instruction.rest, devices)
  size = sum(size for _, size in arrays)
  if kind == "reduce-scatter":
    size *= group
  # On TPUs, a fusion that keeps one part of an all-reduce.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  return Collective(kind, "+".join(sorted({dtype for dtype, _ in arrays})), group, 1, size, True)


def _group(attributes: str, devices: int) -> int:
  """Returns the number of devices in one group, from any of XLA's notations."""
  match = re.search(r"replica_groups=(.*)", attributes)
  if match is None:
    # A collective-permute has pairs.
    return 2
  groups = match[1]
  # mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b':(1)2}
  if groups.startswith("mesh["):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.partition("]")[0]))
    axes = re.search(r"\{([^}]*)\}", groups)
    names = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[1]) if axes else []
    return math.prod(int(part or sizes[name]) for name, part in names)
  # [groups,devices]<=[4,2]T(1,0)
  if groups.startswith("["):
    return int(re.findall(r"\d+", groups)[1])
  # {{0,1},{2,3}}; {} is one group of all.
  first = re.match(r"\{\{([\d, ]*)\}", groups)
  return len(first[1].split(",")) if first else devices


def _uses(program: _Program) -> dict[str, _Use]:
  """Returns how often each computation runs, the entry first."""
  uses: dict[str, _Use] = {}

  def visit(name: str, use: _Use) -> None:
    old = uses.get(name, _Use(0, True))
    uses[name] = _Use(old.times + use.times, old.exact and use.exact)
    for instruction in program.computations[name]:
      # The later parts of an asynchronous call name the same computation.
      if instruction.opcode.endswith(("-update", "-done")):
        continue
      trips = _trips(program, instruction) if instruction.opcode == "while" else 1
      inner = _Use(use.times * (1 if trips is None else trips), use.exact and trips is not None)
      for called in _all_called(instruction):
        visit(called, inner)

  visit(program.entry, _Use(1, True))
  return uses


def _reachable(program: _Program, start: str) -> set[str]:
  """Returns the computation and all that it calls."""
  names: set[str] = set()
  new = {start}
  while new:
    names |= new
    instructions = [i for name in new for i in program.computations[name]]
    new = {name for i in instructions for name in _all_called(i)} - names
  return names


def _trips(program: _Program, loop: _Instruction) -> int | None:
  """Returns the trips by XLA's own note, or by a condition `counter < constant`.

  What a scan becomes counts up from 0.
  """
  note = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if note:
    return int(note[1])
  condition = program.computations[_called(loop)["condition"]]
  limits = {i.name: i.rest for i in condition if i.opcode == "constant"}
  trivial = ("parameter", "get-tuple-element", "constant")
  tests = [i.rest for i in condition if i.opcode not in trivial]
  test = re.match(r"%[\w.-]+, %([\w.-]+)\), direction=LT", tests[0]) if len(tests) == 1 else None
  limit = re.match(r"(\d+)\)", limits.get(test[1], "")) if test else None
  return int(limit[1]) if limit else None


def _is_product(instruction: _Instruction) -> bool:
  target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
  is_product = target and re.search("gemm|matmul|conv|dot", target[1].lower())
  return instruction.opcode in ("convolution", "dot") or bool(is_product)


def _called(instruction: _Instruction) -> dict[str, str]:
  return dict(_CALLS.findall(instruction.rest))


def _all_called(instruction: _Instruction) -> list[str]:
  lists = [
    name.strip(" %") for names in _CALL_LISTS.findall(instruction.rest) for name in names.split(",")
  ]
  return [name for _, name in _CALLS.findall(instruction.rest)] + lists


def _arrays(type_: str) -> Iterator[tuple[str, int]]:
  """Yields (dtype, bytes) of each array in a type."""
  for dtype, sizes in _ARRAY.findall(type_):
    bits = _BITS[dtype] if dtype in _BITS else int(re.findall(r"\d+", dtype)[0])
    count = math.prod(int(size.strip("<= ")) for size in sizes.split(",") if size)
    yield dtype, -(-count * bits // 8)


def _parse(text: str) -> _Program:
  computations: dict[str, list[_Instruction]] = {}
  entry = ""
  current: list[_Instruction] | None = None
  devices = 1
  for line in text.splitlines():
    if line.startswith("HloModule"):
      sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)
      devices = math.prod(map(int, sizes))
    elif header := re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$", line):
      current = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif current is not None and (instruction := _instruction(line)):
      current.append(instruction)
  if not entry:
    raise ValueError("text: expected a compiled program (compiled.as_text()), got no ENTRY in it")
  return _Program(computations, entry, devices)


def _instruction(line: str) -> _Instruction | None:
  match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)
  if match is None:
    return None
  rest = match[2]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  call = re.match(r"\s*([\w-]+)\((.*)", rest[end:])
  return _Instruction(match[1], rest[:end], call[1], call[2]) if call else None


def _closing(text: str) -> int:
  """Returns the index of the bracket that closes the first one."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return index
  raise ValueError(f"text: expected a closing bracket, got none in {text[:80]!r}")
