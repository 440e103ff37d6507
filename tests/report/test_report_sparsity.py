"""What a report says about students that are smaller or sparser than others."""

import numpy as np
import pytest

from distill_jax import report
from distill_jax.compression.sizes import Layer
from distill_jax.report import sparsity, variants
from distill_jax.report.results import measure

LAYERS = [Layer("a/kernel", 100, 0), Layer("b/kernel", 50, 0)]
SPARSE = [Layer("a/kernel", 100, 75), Layer("b/kernel", 50, 1)]


def entry(role, seed, right, layers, variant=""):
  logits = np.zeros((40, 2), np.float32)
  logits[np.arange(40), (np.arange(40) >= right).astype(int)] = 2
  nonzeros = sum(layer.parameters - layer.zeros for layer in layers)
  cost = {
    "parameters": 150,
    "nonzeros": nonzeros,
    "compressed": 4 * nonzeros,
    "flops": 10.0,
    "latency_ms": 0.5,
  }
  return report.Entry(
    role, seed, logits, cost | {"throughput_128": 7.0}, [], variant, layers=layers
  )


@pytest.fixture
def entries():
  return [
    entry("teacher", 0, 39, LAYERS),
    entry("baseline", 0, 30, LAYERS),
    entry("student", 0, 31, LAYERS, "kd"),
    entry("student", 0, 29, SPARSE, "pruned"),
  ]


def test_zeros_are_shown_layer_by_layer(entries, tmp_path):
  path = report.write(
    tmp_path,
    entries,
    labels=np.zeros(40, int),
    images=None,
    ids=np.arange(40),
    class_names=["a", "b"],
    run={},
  )
  text = path.with_suffix(".md").read_text()
  lines = [line for line in text.splitlines() if line.startswith("| a/kernel")]
  assert [line.split(" | ")[1:] for line in lines] == [["100 · 0 %", "100 · 0 %", "25 · 75 % |"]]
  assert (tmp_path / "costs.png").stat().st_size > 1000
  assert "| Not zero ↓ | On disk, compressed, bytes ↓ |" in text


def test_of_students_of_one_size_nothing_is_said(entries):
  measured = measure(entries[:3], np.zeros(40, int))
  assert not variants.differ_in_size(measured) and variants.differ_in_size(
    measure(entries, np.zeros(40, int))
  )
  few = variants.table(measured, {})
  assert "Not zero ↓" not in few.header


def test_costs_stand_beside_scores_in_rows(entries):
  table = variants.table(measure(entries, np.zeros(40, int)), {})
  assert table.rows[-1][table.header.index("Not zero ↓")] == "74"
  assert table.rows[0][table.header.index("Examples/s at batch 128 ↑")] == "7"


def test_every_cost_that_is_known_has_a_panel(entries):
  picture = sparsity.score_against_costs(measure(entries, np.zeros(40, int)))
  assert [axes.get_xlabel() for axes in picture.axes][:2] == [
    "parameters",
    "parameters that are not zero",
  ]
  assert len(picture.axes[1].containers) == 4
  bare = [e._replace(cost={}) for e in entries]
  assert sparsity.score_against_costs(measure(bare, np.zeros(40, int))) is None
