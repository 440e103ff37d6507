"""What a compiled train step costs, in numbers and as a table."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from distill_jax.cost.chips import GIB, Chip
from distill_jax.cost.compiling import Compiled


class Parts(NamedTuple):
  """The halves of a distillation step, compiled apart: the teacher's forward pass, and the student's forward and
  backward pass without the update."""

  teacher: Compiled
  student: Compiled


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What a train step costs; `str` of it is a table.

  Attributes:
    topology: what it was compiled for.
    chip: its peaks; None: unknown, as of 'cpu'.
    axes: of the mesh, with their sizes.
    items: what a batch has over all chips: (4096, 'images'), (1048576, 'tokens').
    parameters: how many numbers are trained.
    sizes: bytes of the 'train state', of the 'teacher' and of the 'batch', each once.
    step: the train step, on one chip.
    parts: what it is made of, if that was asked for.
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
    return math.prod(self.axes.values())

  @property
  def fits(self) -> bool:
    """Whether the compiler accepted it; for 'cpu' it always does."""
    return self.step.memory is not None

  @property
  def available(self) -> int | None:
    """Bytes of memory that a chip has for the program; None: unknown."""
    return self.step.available or (self.chip.memory if self.chip else None)

  @property
  def ratio(self) -> float | None:
    """FLOPs of the step over those of its parts; None: unknown, because there are none, or one has loops."""
    if self.parts is None or any(hidden_loops(c) or not c.flops for c in (self.step, *self.parts)):
      return None
    whole, *parts = (c.flops or 0.0 for c in (self.step, *self.parts))
    return whole / sum(parts)

  @property
  def floors(self) -> dict[str, float]:
    """Seconds that a step takes at least; see `floors`."""
    return floors(self.step, self.chip)

  @property
  def floor(self) -> float | None:
    """The larger of the floors; None: there are none."""
    return max(self.floors.values(), default=None)

  @property
  def traffic(self) -> float | None:
    """Seconds that a step takes if every byte that XLA counts crosses the HBM; None: unknown.

    No floor: what stays in on-chip memory from one operation to the next is counted too.
    """
    if self.chip is None or not self.step.accessed:
      return None
    return self.step.accessed / self.chip.bandwidth

  def hours(self, steps: int) -> float | None:
    """Hours that so many steps take at the floor; None: unknown."""
    return None if self.floor is None else steps * self.floor / 3600

  def __str__(self) -> str:
    rest = (_work, _communication, _time) if self.fits else ()
    return "\n".join(line for part in (_head, _memory, *rest) for line in part(self))


def floors(compiled: Compiled, chip: Chip | None) -> dict[str, float]:
  """Seconds that a program takes at least on a chip, by each of its peaks.

  'compute': all its FLOPs (`work`), at the peak in bfloat16. 'memory': every argument read and every result
  written once, at the bandwidth of the HBM. Empty where no peaks are known, or the program does not fit.
  """
  if chip is None or compiled.memory is None:
    return {}
  once = compiled.memory.arguments + compiled.memory.outputs
  return {"compute": work(compiled) / chip.flops, "memory": once / chip.bandwidth}


def work(compiled: Compiled) -> float:
  """FLOPs of a program on one device: XLA's count; but where it counts loops once, at least all their products."""
  counted = compiled.flops or 0.0
  return max(counted, compiled.products or 0.0) if hidden_loops(compiled) else counted


def hidden_loops(compiled: Compiled) -> list[int | None]:
  """The trips of loops with convolutions or matrix products, of which XLA counts one."""
  return [loop.trips for loop in compiled.loops if loop.products]


def _head(analysis: Analysis) -> Iterator[str]:
  axes = ", ".join(f"{name} {size}" for name, size in analysis.axes.items())
  what = analysis.chip.kind if analysis.chip else "devices"
  items, unit = analysis.items
  yield f"{analysis.topology}: {analysis.chips} x {what}, mesh: {axes}; {items:,} {unit} a step"
  yield f"{analysis.parameters:,} parameters are trained; compiled in {analysis.step.seconds:.0f} s"


def _memory(analysis: Analysis) -> Iterator[str]:
  step, available = analysis.step, analysis.available
  once = ", ".join(f"{name} {_gib(size)}" for name, size in analysis.sizes.items() if size)
  yield f"memory of a chip in GiB (in all, each once: {once})"
  if step.memory is not None:
    memory = step.memory
    yield f"  arguments    {_gib(memory.arguments)}"
    yield f"  temporaries  {_gib(memory.temporaries)}"
    yield f"  outputs      {_gib(memory.outputs)}, of which {_gib(memory.aliased)} in the place of donated arguments"
    yield f"  program      {_gib(memory.code)}"
  if available is None:
    yield f"  needed       {_gib(step.needed)}"
  elif analysis.fits:
    yield f"  needed       {_gib(step.needed)} of {_gib(available)}: fits, {_gib(available - step.needed)} left"
  else:
    over = _gib(step.needed - available)
    yield f"  needed       {_gib(step.needed)} of {_gib(available)}: does not fit, {over} too much"


def _work(analysis: Analysis) -> Iterator[str]:
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
    yield f"  products     {step.products or 0:.4g}: FLOPs before compilation, loops as often as they run"
    numbers = collections.Counter(hidden).most_common()
    trips = ", ".join(f"{number} x {trips or 'an unknown number of'}" for trips, number in numbers)
    yield (
      f"  NOTE         loops with matrix products or convolutions ({trips} trips), of which XLA counts one trip: "
      "FLOPs, bytes and traffic are too low; the floor takes the products"
    )


def _communication(analysis: Analysis) -> Iterator[str]:
  if not analysis.step.collectives:
    yield "no communication between chips"
    return
  yield "communication in a step (bytes of the whole arrays)"
  for one in analysis.step.collectives:
    calls = f"{'' if one.exact else 'at least '}{one.calls} x"
    yield f"  {one.kind:<19}{one.dtype:<9} over {one.group:<5}{calls:<5}{one.bytes:,} bytes"


def _time(analysis: Analysis) -> Iterator[str]:
  chip, floor, traffic = analysis.chip, analysis.floor, analysis.traffic
  if chip is None or not floor:
    yield "no floor: no peaks are known of this device"
    return
  by, flops, bandwidth = analysis.floors, chip.flops / 1e12, chip.bandwidth / 1e9
  yield f"time of a step (peaks: {chip.source})"
  yield f"  compute      {_ms(by['compute'])}: all FLOPs at {flops:g} TFLOP/s, in bfloat16"
  yield f"  memory       {_ms(by['memory'])}: arguments and outputs once, at {bandwidth:g} GB/s"
  yield f"  floor        {_ms(floor)}: {_rate(analysis, floor)}"
  if traffic and traffic > floor:
    yield f"  traffic      {_ms(traffic)}: {_rate(analysis, traffic)}, if nothing stayed on chip between operations"
  if analysis.parts is not None:
    alone = max(floors(analysis.parts.teacher, chip).values(), default=0.0)
    yield f"  teacher      {_ms(alone)}: its forward pass alone, at least"


def _rate(analysis: Analysis, seconds: float) -> str:
  items, unit = analysis.items
  return f"{items / seconds:,.0f} {unit}/s, {items / seconds / analysis.chips:,.0f} a chip"


def _gib(size: float) -> str:
  return f"{size / GIB:.2f}"


def _ms(seconds: float) -> str:
  return f"{seconds * 1e3:.4g} ms"
