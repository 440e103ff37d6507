"""Describes what a compiled train step costs, as values and as a table."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from distill_jax.cost.chips import GIB, Chip
from distill_jax.cost.compiling import Compiled


class Parts(NamedTuple):
  """The halves of a distillation step, each compiled as a program.

  Attributes:
    teacher: the teacher's forward pass.
    student: the student's forward and backward pass, without the update.

  Example in `compile_for`.
  """

  teacher: Compiled
  student: Compiled


@dataclasses.dataclass(frozen=True)
class Analysis:
  """The cost of a train step; `str` of it is a table.

  Attributes:
    topology: slice that it was compiled for.
    chip: its peaks; None: unknown, as of 'cpu'.
    axes: sizes of the mesh's axes.
    items: number and unit of a global batch: (4096, 'images'), (1048576, 'tokens').
    parameters: number of trained parameters.
    sizes: bytes of the 'train state', of the 'teacher' and of the 'batch', each once.
    step: cost of the train step on one chip.
    parts: cost of its halves; None: they were not compiled.

  Example in `compile_for`.
  """

  topology: str
  chip: Chip | None
  axes: Mapping[str, int]
  items: tuple[int, str]
  parameters: int
  sizes: Mapping[str, int]
  step: Compiled
  parts: Parts | None = None

  @property
  def chips(self) -> int:
    """Number of chips."""
    return math.prod(self.axes.values())

  @property
  def fits(self) -> bool:
    """Whether the program fits into memory; on 'cpu' it always does."""
    return self.step.memory is not None

  @property
  def available(self) -> int | None:
    """Bytes of memory that a chip has for the program; None: unknown."""
    return self.step.available or (self.chip.memory if self.chip else None)

  @property
  def ratio(self) -> float | None:
    """FLOPs of the step over those of its parts; None: no parts, or loops in a program."""
    if self.parts is None or any(hidden_loops(c) or not c.flops for c in (self.step, *self.parts)):
      return None
    step_flops, *part_flops = (c.flops or 0.0 for c in (self.step, *self.parts))
    return step_flops / sum(part_flops)

  @property
  def lower_bounds(self) -> dict[str, float]:
    """Seconds that a step takes at least, by each of the chip's peaks; see `lower_bounds`."""
    return lower_bounds(self.step, self.chip)

  @property
  def lower_bound(self) -> float | None:
    """The largest of the lower bounds, in seconds; None: there are none."""
    return max(self.lower_bounds.values(), default=None)

  @property
  def traffic(self) -> float | None:
    """Seconds that a step takes if every byte that XLA counts crosses the HBM; None: unknown.

    This is no lower bound: it counts data that stays in on-chip memory between operations.
    """
    if self.chip is None or not self.step.accessed:
      return None
    return self.step.accessed / self.chip.bandwidth

  def hours(self, steps: int) -> float | None:
    """Returns the hours that `steps` steps take at the lower bound; None: unknown."""
    return None if self.lower_bound is None else steps * self.lower_bound / 3600

  def __str__(self) -> str:
    rest = (_flops, _communication, _time) if self.fits else ()
    return "\n".join(line for part in (_head, _memory, *rest) for line in part(self))


def lower_bounds(compiled: Compiled, chip: Chip | None) -> dict[str, float]:
  """Returns the seconds that a program takes at least on a chip, by each of its peaks.

  'compute': all its FLOPs (`total_flops`), at the peak in bfloat16. 'memory': every argument read
  and every result written once, at the bandwidth of the HBM. Empty if no peaks are known, or the
  program does not fit.
  """
  if chip is None or compiled.memory is None:
    return {}
  size = compiled.memory.arguments + compiled.memory.outputs
  return {"compute": total_flops(compiled) / chip.flops, "memory": size / chip.bandwidth}


def total_flops(compiled: Compiled) -> float:
  """Returns the FLOPs of a program on one device: XLA's count, or all products if that is larger.

  XLA counts one trip of a loop; only then are the products taken.
  """
  xla_flops = compiled.flops or 0.0
  return max(xla_flops, compiled.products or 0.0) if hidden_loops(compiled) else xla_flops


def hidden_loops(compiled: Compiled) -> list[int | None]:
  """Returns the trips of loops with convolutions or matrix products, of which XLA counts one."""
  return [loop.trips for loop in compiled.loops if loop.products]


def _head(analysis: Analysis) -> Iterator[str]:
  axes = ", ".join(f"{name} {size}" for name, size in analysis.axes.items())
  kind = analysis.chip.kind if analysis.chip else "devices"
  items, unit = analysis.items
  yield f"{analysis.topology}: {analysis.chips} x {kind}, mesh: {axes}; {items:,} {unit} a step"
  yield f"{analysis.parameters:,} parameters are trained; compiled in {analysis.step.seconds:.0f} s"


def _memory(analysis: Analysis) -> Iterator[str]:
  step = analysis.step
  available = analysis.available
  once = ", ".join(f"{name} {_gib(size)}" for name, size in analysis.sizes.items() if size)
  yield f"memory of a chip in GiB (in all, each once: {once})"
  if step.memory is not None:
    memory = step.memory
    yield f"  arguments    {_gib(memory.arguments)}"
    yield f"  temporaries  {_gib(memory.temporaries)}"
    aliased = f"of which {_gib(memory.aliased)} reuse donated arguments"
    yield f"  outputs      {_gib(memory.outputs)}, {aliased}"
    yield f"  program      {_gib(memory.code)}"
  if available is None:
    yield f"  needed       {_gib(step.needed)}"
  elif analysis.fits:
    left = _gib(available - step.needed)
    yield f"  needed       {_gib(step.needed)} of {_gib(available)}: fits, {left} left"
  else:
    over = _gib(step.needed - available)
    yield f"  needed       {_gib(step.needed)} of {_gib(available)}: does not fit, {over} too much"


def _flops(analysis: Analysis) -> Iterator[str]:
  step = analysis.step
  yield "work of a chip in a step"
  yield f"  FLOPs        {step.flops or 0:.4g}"
  if analysis.parts is not None:
    teacher, student = (part.flops or 0 for part in analysis.parts)
    ratio = f"{analysis.ratio:.4f} x " if analysis.ratio else ""
    both = f"(teacher forward {teacher:.4g} + student forward and backward {student:.4g})"
    yield f"               {ratio}{both}"
  yield f"  bytes        {step.accessed or 0:.4g}"
  if hidden := hidden_loops(step):
    products = f"{step.products or 0:.4g}"
    yield f"  products     {products}: FLOPs before compilation, loops as often as they run"
    numbers = collections.Counter(hidden).most_common()
    trips = ", ".join(f"{number} x {trips or 'an unknown number of'}" for trips, number in numbers)
    yield (
      f"  NOTE         loops with matrix products or convolutions ({trips} trips), of which XLA "
      "counts one trip: FLOPs, bytes and traffic are too low; the lower bound uses the products"
    )


def _communication(analysis: Analysis) -> Iterator[str]:
  if not analysis.step.collectives:
    yield "no communication between chips"
    return
  yield "communication in a step (bytes of the full arrays)"
  for collective in analysis.step.collectives:
    calls = f"{'' if collective.exact else 'at least '}{collective.calls} x"
    arrays = f"{collective.kind:<19}{collective.dtype:<9} over {collective.group:<5}"
    yield f"  {arrays}{calls:<5}{collective.bytes:,} bytes"


def _time(analysis: Analysis) -> Iterator[str]:
  chip, bound, traffic = analysis.chip, analysis.lower_bound, analysis.traffic
  if chip is None or not bound:
    yield "no lower bound: the peaks of this device are unknown"
    return
  bounds = analysis.lower_bounds
  compute = f"all FLOPs at {chip.flops / 1e12:g} TFLOP/s, in bfloat16"
  memory = f"arguments and outputs once, at {chip.bandwidth / 1e9:g} GB/s"
  yield f"time of a step (peaks: {chip.source})"
  yield f"  compute      {_ms(bounds['compute'])}: {compute}"
  yield f"  memory       {_ms(bounds['memory'])}: {memory}"
  yield f"  lower bound  {_ms(bound)}: {_rate(analysis, bound)}"
  if traffic and traffic > bound:
    condition = "if nothing stayed on chip between operations"
    yield f"  traffic      {_ms(traffic)}: {_rate(analysis, traffic)}, {condition}"
  if analysis.parts is not None:
    teacher = max(lower_bounds(analysis.parts.teacher, chip).values(), default=0.0)
    yield f"  teacher      {_ms(teacher)}: its forward pass only, at least"


def _rate(analysis: Analysis, seconds: float) -> str:
  items, unit = analysis.items
  return f"{items / seconds:,.0f} {unit}/s, {items / seconds / analysis.chips:,.0f} a chip"


def _gib(size: float) -> str:
  return f"{size / GIB:.2f}"


def _ms(seconds: float) -> str:
  return f"{seconds * 1e3:.4g} ms"
