"""What the text of a compiled program says about communication and loops.

`compiled.as_text()` is XLA's optimized HLO for one device: computations, one after the other, each a list of
`%name = type opcode(operands), attributes`.
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
    dtype: of the arrays, 'bf16'; several as 'bf16+f32'.
    group: how many devices take part together.
    calls: per execution of the program, those in loops once for each trip.
    bytes: per execution, of the whole arrays: what each device gives to an all-reduce or a reduce-scatter, and gets
      from an all-gather. How much of that crosses a link depends on the algorithm.
    exact: False where some are in a loop of unknown length, of which one trip is counted.
  """

  kind: str
  dtype: str
  group: int
  calls: int
  bytes: int
  exact: bool


class Loop(NamedTuple):
  """A `while`.

  Attributes:
    trips: how often its body runs each time; None: unknown.
    products: convolutions and matrix products in its body. XLA's cost analysis counts the FLOPs of one trip.
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
  """How often a computation runs per execution of the program."""

  times: int
  exact: bool


def collectives(text: str) -> tuple[Collective, ...]:
  """The communication in the text of a compiled program, largest first; see `Collective`."""
  program = _parse(text)
  found: dict[tuple[str, str, int], Collective] = {}
  # An asynchronous one that is fused with other work stands in several computations, under one channel.
  seen: set[tuple[str, str]] = set()
  for computation, use in _uses(program).items():
    for instruction in program.computations[computation]:
      kind = instruction.opcode.removesuffix("-start")
      if kind not in KINDS or not use.times:
        continue
      channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
      if channel:
        if (kind, channel[1]) in seen:
          continue
        seen.add((kind, channel[1]))
      one = _collective(computation, instruction, kind, program.devices)
      key = one.kind, one.dtype, one.group
      old = found.get(key, Collective(*key, 0, 0, True))
      found[key] = old._replace(
        calls=old.calls + use.times,
        bytes=old.bytes + use.times * one.bytes,
        exact=old.exact and use.exact,
      )
  return tuple(sorted(found.values(), key=lambda c: -c.bytes))


def loops(text: str) -> tuple[Loop, ...]:
  """The `while` loops in the text of a compiled program, those inside others too."""
  program = _parse(text)
  found = []
  for computation in _uses(program):
    for instruction in program.computations[computation]:
      if instruction.opcode == "while":
        inside = [
          i
          for name in _reached(program, _called(instruction)["body"])
          for i in program.computations[name]
        ]
        found.append(Loop(_trips(program, instruction), sum(map(_is_product, inside))))
  return tuple(found)


def _collective(computation: str, instruction: _Instruction, kind: str, devices: int) -> Collective:
  arrays = list(_arrays(instruction.type))
  if instruction.opcode.endswith("-start") and kind != "all-reduce":
    arrays = [a for a in arrays if a != ("u32", 4)]  # contexts
    half = len(arrays) // 2  # operands and results
    arrays = arrays[:half] if kind == "collective-permute" else arrays[half:]
  group = _group(instruction.rest, devices)
  total = sum(size for _, size in arrays)
  if kind == "reduce-scatter":
    total *= group
  if kind == "all-reduce" and computation.startswith(
    "all-reduce-scatter"
  ):  # TPU: a fusion that keeps one part
    kind = "reduce-scatter"
  return Collective(kind, "+".join(sorted({dtype for dtype, _ in arrays})), group, 1, total, True)


def _group(attributes: str, devices: int) -> int:
  """How many devices are in one group, from any of XLA's notations."""
  found = re.search(r"replica_groups=(.*)", attributes)
  if found is None:  # collective-permute: pairs
    return 2
  groups = found[1]
  if groups.startswith("mesh["):  # mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b':(1)2}
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.partition("]")[0]))
    axes = re.search(r"\{([^}]*)\}", groups)
    used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[1]) if axes else []
    return math.prod(int(part or sizes[name]) for name, part in used)
  if groups.startswith("["):  # [groups,devices]<=[4,2]T(1,0)
    return int(re.findall(r"\d+", groups)[1])
  first = re.match(r"\{\{([\d, ]*)\}", groups)  # {{0,1},{2,3}}; {} is one group of all
  return len(first[1].split(",")) if first else devices


def _uses(program: _Program) -> dict[str, _Use]:
  """The computations that run, the entry first."""
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


def _reached(program: _Program, start: str) -> set[str]:
  """The computation and all that it calls."""
  found: set[str] = set()
  new = {start}
  while new:
    found |= new
    new = {
      name for old in new for i in program.computations[old] for name in _all_called(i)
    } - found
  return found


def _trips(program: _Program, loop: _Instruction) -> int | None:
  """From XLA's own note, or from a condition `counter < constant`: what a scan becomes counts up from 0."""
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if noted:
    return int(noted[1])
  condition = program.computations[_called(loop)["condition"]]
  limits = {i.name: i.rest for i in condition if i.opcode == "constant"}
  tests = [
    i.rest for i in condition if i.opcode not in ("parameter", "get-tuple-element", "constant")
  ]
  test = re.match(r"%[\w.-]+, %([\w.-]+)\), direction=LT", tests[0]) if len(tests) == 1 else None
  limit = re.match(r"(\d+)\)", limits.get(test[1], "")) if test else None
  return int(limit[1]) if limit else None


def _is_product(instruction: _Instruction) -> bool:
  target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
  named = target and re.search("gemm|matmul|conv|dot", target[1].lower())
  return instruction.opcode in ("convolution", "dot") or bool(named)


def _called(instruction: _Instruction) -> dict[str, str]:
  return dict(_CALLS.findall(instruction.rest))


def _all_called(instruction: _Instruction) -> list[str]:
  lists = [
    name.strip(" %") for names in _CALL_LISTS.findall(instruction.rest) for name in names.split(",")
  ]
  return [name for _, name in _CALLS.findall(instruction.rest)] + lists


def _arrays(type_: str) -> Iterator[tuple[str, int]]:
  """(dtype, bytes) of each array in a type."""
  for dtype, sizes in _ARRAY.findall(type_):
    bits = _BITS[dtype] if dtype in _BITS else int(re.findall(r"\d+", dtype)[0])
    count = math.prod(int(size.strip("<= ")) for size in sizes.split(",") if size)
    yield dtype, -(-count * bits // 8)


def _parse(text: str) -> _Program:
  computations: dict[str, list[_Instruction]] = {}
  entry, current, devices = "", None, 1
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
    raise ValueError("expected the text of a compiled program (compiled.as_text()), found no ENTRY")
  return _Program(computations, entry, devices)


def _instruction(line: str) -> _Instruction | None:
  found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)
  if found is None:
    return None
  rest = found[2]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  call = re.match(r"\s*([\w-]+)\((.*)", rest[end:])
  return _Instruction(found[1], rest[:end], call[1], call[2]) if call else None


def _closing(text: str) -> int:
  """The place of the bracket that closes the first one."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return place
  raise ValueError(f"no closing bracket in {text[:80]!r}")
