"""Lists the peaks of TPU chips, and parses the names of their slices."""

import math
import re
from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """The peaks of one chip.

  Attributes:
    kind: Google's name of it.
    flops: FLOP/s in bfloat16.
    bandwidth: bytes/s to and from its HBM.
    memory: bytes of HBM that a program may use; libtpu reserves the rest of the 32, 16, 95 and 32
      GB.
    axes: number of axes of a slice, 2 or 3.
    source: page with the peaks.

  >>> from distill_jax import cost
  >>> cost.CHIPS["v5e"].kind, cost.CHIPS["v5e"].flops
  ('TPU v5e', 197000000000000.0)
  """

  kind: str
  flops: float
  bandwidth: float
  memory: int
  axes: int
  source: str


# Peaks: "peak compute per chip (bf16)" and "HBM bandwidth" in Google's tables. Memory: the
# "available HBM" of libtpu 0.0.42 where it rejects a program.
CHIPS = {
  "v4": Chip("TPU v4", 275e12, 1200e9, int(30.75 * GIB), 3, "cloud.google.com/tpu/docs/v4"),
  "v5e": Chip("TPU v5e", 197e12, 819e9, int(15.75 * GIB), 2, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip("TPU v5p", 459e12, 2765e9, int(95.74 * GIB), 3, "cloud.google.com/tpu/docs/v5p"),
  "v6e": Chip(
    "TPU v6e (Trillium)", 918e12, 1638e9, int(31.25 * GIB), 2, "cloud.google.com/tpu/docs/v6e"
  ),
}
# Largest grid of chips that libtpu gives one host by default.
_HOST = (2, 2, 1)


class Slice(NamedTuple):
  """A grid or torus of chips of one kind."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of chips."""
    return math.prod(self.shape)


def parse_topology(topology: str) -> Slice:
  """Returns the slice of a name such as 'v5e:4x4' or 'v5p:8x8x8'.

  Raises:
    ValueError: there is no such chip, or its slices have another number of axes.
  """
  name, _, sizes = topology.partition(":")
  text = f"topology: expected 'cpu', 'v5e:4x4', 'v5p:2x2x1' or the like, got {topology!r}"
  if name not in CHIPS:
    raise ValueError(f"{text}: use a chip of {', '.join(CHIPS)}")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
    raise ValueError(text)
  shape = tuple(map(int, sizes.split("x")))
  if len(shape) != CHIPS[name].axes:
    raise ValueError(f"{text}: slices of {name} have {CHIPS[name].axes} axes")
  return Slice(CHIPS[name], shape)


def topology_options(topology: str) -> dict[str, Any]:
  """Returns libtpu's options for the devices that jax shows on such a slice."""
  slice_ = parse_topology(topology)
  # A v4 chip has two cores, which jax joins to one device; by default libtpu lists both.
  options: dict[str, Any] = {"chip_config_name": "megacore"} if slice_.chip is CHIPS["v4"] else {}
  shape = (*slice_.shape, 1)[:3]
  if any(size < host for size, host in zip(shape, _HOST)):
    options["chips_per_host_bounds"] = tuple(map(min, shape, _HOST))
  return options
