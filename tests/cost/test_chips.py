"""Chips and the names of slices."""

import pytest

from distill_jax.cost.chips import CHIPS, slice_of, topology_options


def test_peaks_are_in_the_order_of_the_generations():
  # One slip of a unit would be a factor of 1,000: compare with what is known of all.
  for name, chip in CHIPS.items():
    assert 100e12 < chip.flops < 1000e12 and 500e9 < chip.bandwidth < 3000e9, name
    assert 100 < chip.flops / chip.bandwidth < 600, name  # FLOPs a byte, to be bound by compute
    assert 15 * 2**30 < chip.memory < 96 * 2**30 and name[:2] in chip.kind, name
    assert chip.source == f"cloud.google.com/tpu/docs/{name}"
  assert CHIPS["v6e"].flops > CHIPS["v5p"].flops > CHIPS["v4"].flops > CHIPS["v5e"].flops


def test_slices():
  assert (slice_of("v5e:4x4").size, slice_of("v5p:8x8x8").size) == (16, 512)
  assert slice_of("v6e:16x16").chip is CHIPS["v6e"]


@pytest.mark.parametrize(
  "topology, options",
  [
    ("v4:4x4x4", {"chip_config_name": "megacore"}),
    ("v4:1x1x1", {"chip_config_name": "megacore", "chips_per_host_bounds": (1, 1, 1)}),
    ("v5e:4x4", {}),
    ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    ("v6e:2x1", {"chips_per_host_bounds": (2, 1, 1)}),
    ("v5p:2x2x1", {}),
  ],
)
def test_what_libtpu_is_told(topology, options):
  assert topology_options(topology) == options


@pytest.mark.parametrize(
  "topology, message",
  [
    (
      "v5e-16",
      "expected 'cpu', or a chip and a shape such as 'v5e:4x4' .* got 'v5e-16'; chips: v4, v5e, v5p, v6e",
    ),
    ("v5:4x4", "chips: v4"),
    ("v5e", "got 'v5e'"),
    ("v5e:4x0", "got 'v5e:4x0'"),
    ("v5e:4x", "got"),
    ("v5e:4x4x4", "slices of v5e have 2 axes"),
    ("v5p:4x4", "slices of v5p have 3 axes"),
    ("gpu", "got 'gpu'"),
  ],
)
def test_names_of_no_slice_are_refused(topology, message):
  with pytest.raises(ValueError, match=f"topology: .*{message}"):
    slice_of(topology)
