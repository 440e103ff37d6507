"""What a report says about students that differ in the number that ends their names."""

import numpy as np
import pytest

from distill_jax import report
from distill_jax.report import series
from distill_jax.report.results import measure

RIGHT = {
  "online": 32,
  "top.4": 33,
  "top.16": 35,
  "top.1": 31,
  "draws.1": 30,
  "draws.2": 29,
  "other.x": 28,
}
RIGHT |= {"v0.25": 28, "v0.5": 29, "v0.75": 30}


def entry(role, seed, right, variant=""):
  logits = np.zeros((40, 2), np.float32)
  logits[np.arange(40), (np.arange(40) >= right).astype(int)] = 2
  return report.Entry(role, seed, logits, {"parameters": 150}, [], variant)


def entries():
  known = [entry("teacher", 0, 39), entry("baseline", 0, 30), entry("baseline", 1, 28)]
  return known + [
    entry("student", seed, n + seed, name) for name, n in RIGHT.items() for seed in (0, 1)
  ]


def test_names_that_end_in_three_numbers_are_a_series():
  found = series.series(measure(entries(), np.zeros(40, int)))
  assert {name: [*numbers] for name, numbers in found.items()} == {"top": [1, 4, 16]}
  assert found["top"][4].variant == "top.4"


def test_the_curve_is_of_the_means_in_the_order_of_the_numbers():
  picture = series.score_against_number(measure(entries(), np.zeros(40, int)))
  accuracy, calibration = picture.axes
  lines = {container.get_label(): container[0] for container in accuracy.containers}
  x, y = (np.array(lines["top"].get_data()[axis], float) for axis in (0, 1))
  np.testing.assert_allclose(x, [1, 4, 16])
  np.testing.assert_allclose(y, [31.5 / 0.4, 33.5 / 0.4, 35.5 / 0.4])
  levels = {line.get_label(): line.get_ydata()[0] for line in accuracy.lines[:3]}
  assert {**levels} == pytest.approx(
    {"Teacher": 39 / 0.4, "Student alone": 29 / 0.4, "online": 32.5 / 0.4}, rel=1e-5
  )
  assert calibration.get_ylabel() == "calibration error, %"
  colors = [line.get_color() for line in (lines["top"], *accuracy.lines[:3])]
  assert len(set(colors)) == 4


def test_it_is_in_the_report_where_there_is_one(tmp_path):
  common = {
    "labels": np.zeros(40, int),
    "images": None,
    "ids": np.arange(40),
    "class_names": ["a", "b"],
  }
  report.write(tmp_path / "some", entries(), **common, run={})
  report.write(tmp_path / "none", entries()[:5], **common, run={})
  assert (tmp_path / "some" / "series.png").stat().st_size > 1000
  assert "series.png" in (tmp_path / "some" / "report.md").read_text()
  assert not (tmp_path / "none" / "series.png").exists()
