"""What is known of the chips, and how slices of them are named."""

import math
import re
from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """Peaks of one chip.

  Attributes:
    kind: as Google names it.
    flops: FLOP/s in bfloat16.
    bandwidth: bytes/s to and from its HBM.
    memory: bytes of HBM that a program may use; libtpu keeps the rest of the 32, 16, 95 and 32 GB for itself.
    axes: of a slice: 2 or 3.
    source: of the peaks.
  """

  kind: str
  flops: float
  bandwidth: float
  memory: int
  axes: int
  source: str


# Peaks: "peak compute per chip (bf16)" and "HBM bandwidth" in Google's tables. Memory: what libtpu 0.0.42 calls
# "available HBM" where it refuses a program.
CHIPS = {
  "v4": Chip("TPU v4", 275e12, 1200e9, int(30.75 * GIB), 3, "cloud.google.com/tpu/docs/v4"),
  "v5e": Chip("TPU v5e", 197e12, 819e9, int(15.75 * GIB), 2, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip("TPU v5p", 459e12, 2765e9, int(95.74 * GIB), 3, "cloud.google.com/tpu/docs/v5p"),
  "v6e": Chip(
    "TPU v6e (Trillium)", 918e12, 1638e9, int(31.25 * GIB), 2, "cloud.google.com/tpu/docs/v6e"
  ),
}
_HOST = (2, 2, 1)  # chips that one host has, at most, unless libtpu is told otherwise


class Slice(NamedTuple):
  """Chips of one kind in a grid or torus of this shape."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)


def slice_of(topology: str) -> Slice:
  """The slice of a name such as 'v5e:4x4' or 'v5p:8x8x8'.

  Raises:
    ValueError: there is no such chip, or the shape has another number of axes than its slices have.
  """
  name, _, sizes = topology.partition(":")
  wanted = f"topology: expected 'cpu', or a chip and a shape such as 'v5e:4x4' or 'v5p:2x2x1', got {topology!r}"
  if name not in CHIPS:
    raise ValueError(f"{wanted}; chips: {', '.join(CHIPS)}")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
    raise ValueError(wanted)
  shape = tuple(map(int, sizes.split("x")))
  if len(shape) != CHIPS[name].axes:
    raise ValueError(f"{wanted}: slices of {name} have {CHIPS[name].axes} axes")
  return Slice(CHIPS[name], shape)


def topology_options(topology: str) -> dict[str, Any]:
  """What libtpu has to be told beside the name, to describe the slice as jax shows it on such a slice."""
  slice_ = slice_of(topology)
  # A v4 chip has two cores, which jax joins to one device; the description would list them apart.
  options: dict[str, Any] = {"chip_config_name": "megacore"} if slice_.chip is CHIPS["v4"] else {}
  shape = (*slice_.shape, 1)[:3]
  if any(size < host for size, host in zip(shape, _HOST)):
    options["chips_per_host_bounds"] = tuple(map(min, shape, _HOST))
  return options
