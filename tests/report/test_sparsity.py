"""Students that are smaller or sparser than others."""

import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import ACCURACY, scored, write

from distill_jax.compression.sizes import Layer
from distill_jax.report import sparsity, variants

DENSE = [Layer("a/kernel", 100, 0), Layer("b/kernel", 50, 0)]
SPARSE = [Layer("a/kernel", 100, 75), Layer("b/kernel", 50, 1)]


def entry(role, accuracy, layers, variant=""):
  nonzeros = sum(layer.parameters - layer.zeros for layer in layers)
  cost = {
    "parameters": 150,
    "nonzeros": nonzeros,
    "compressed": 4 * nonzeros,
    "flops": 10.0,
    "latency_ms": 0.5,
    "throughput_128": 7.0,
  }
  return scored(role, 0, accuracy, variant, cost=cost, layers=layers)


ENTRIES = [
  entry("teacher", 0.95, DENSE),
  entry("baseline", 0.75, DENSE),
  entry("student", 0.77, DENSE, "kd"),
  entry("student", 0.72, SPARSE, "pruned"),
]


def test_report_has_costs_and_zeros_by_layer(tmp_path):
  _, markdown, _ = write(tmp_path, ENTRIES)
  lines = [line for line in markdown.splitlines() if line.startswith("| a/kernel")]
  assert [line.split(" | ")[1:] for line in lines] == [["100 · 0 %", "100 · 0 %", "25 · 75 % |"]]
  assert np.ptp(imread(tmp_path / "costs.png")) > 0
  assert "| Not zero ↓ | On disk, compressed, bytes ↓ |" in markdown


def test_students_of_one_size_have_no_columns_of_costs():
  assert not variants.differ_in_size(ENTRIES[:3]) and variants.differ_in_size(ENTRIES)
  assert "Not zero ↓" not in variants.table(ENTRIES[:3], [ACCURACY], {}).header


def test_costs_are_columns_where_students_differ_in_size():
  table = variants.table(ENTRIES, [ACCURACY], {})
  assert table.rows[-1][table.header.index("Not zero ↓")] == "74"
  assert table.rows[0][table.header.index("Examples/s at batch 128 ↑")] == "7"


def test_each_cost_has_a_panel():
  drawing = sparsity.score_against_costs(ENTRIES, ACCURACY)
  labels = [axes.get_xlabel() for axes in drawing.axes]
  assert labels[:2] == ["parameters", "nonzero parameters"]
  points = [c.lines[0].get_xydata()[0] for c in drawing.axes[1].containers]
  np.testing.assert_allclose(points, [[150, 95], [150, 75], [150, 77], [74, 72]])
  texts = [text.get_text() for text in drawing.legends[0].get_texts()]
  assert texts == ["1 Teacher", "2 Baseline", "3 Distilled: kd", "4 Distilled: pruned"]
  assert drawing.axes[0].get_ylabel() == "test accuracy, %"
  bare = [e._replace(cost={}) for e in ENTRIES]
  assert sparsity.score_against_costs(bare, ACCURACY) is None


@pytest.mark.parametrize("missing", [0, 1])
def test_a_layer_of_some_networks_only_is_a_dash_for_others(missing):
  entries = [*ENTRIES[:2], ENTRIES[2]._replace(layers=[DENSE[1 - missing]])]
  table = sparsity.table(entries)
  assert table.header == ["Layer", "Baseline", "kd"]
  assert table.rows[missing][2] == "–" and table.rows[1 - missing][2].endswith("0 %")
