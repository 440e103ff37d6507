"""Peaks of chips, and names of slices."""

import pytest

from distill_jax.cost.chips import CHIPS, parse_topology, topology_options


def test_peaks_have_the_order_of_the_generations():
  # A wrong unit would be a factor of 1,000: compare with the range of all.
  for name, chip in CHIPS.items():
    assert 100e12 < chip.flops < 1000e12 and 500e9 < chip.bandwidth < 3000e9, name
    # FLOPs a byte from which compute is the bound.
    assert 100 < chip.flops / chip.bandwidth < 600, name
    assert 15 * 2**30 < chip.memory < 96 * 2**30 and name[:2] in chip.kind, name
    assert chip.source == f"cloud.google.com/tpu/docs/{name}"
  assert CHIPS["v6e"].flops > CHIPS["v5p"].flops > CHIPS["v4"].flops > CHIPS["v5e"].flops


def test_slices_have_sizes_and_chips():
  assert (parse_topology("v5e:4x4").size, parse_topology("v5p:8x8x8").size) == (16, 512)
  assert parse_topology("v6e:16x16").chip is CHIPS["v6e"]


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
def test_options_for_libtpu(topology, options):
  assert topology_options(topology) == options


@pytest.mark.parametrize(
  "topology, message",
  [
    ("v5e-16", "'v5e-16'.*v4, v5e, v5p, v6e"),
    ("v5:4x4", "v4, v5e"),
    ("v5e", "'v5e'$"),
    ("v5e:4x0", "'v5e:4x0'$"),
    ("v5e:4x", "'v5e:4x'$"),
    ("v5e:4x4x4", "v5e have 2 axes"),
    ("v5p:4x4", "v5p have 3 axes"),
    ("gpu", "'gpu'"),
  ],
)
def test_names_of_no_slice_raise(topology, message):
  with pytest.raises(ValueError, match=rf"topology: .*{message}"):
    parse_topology(topology)
