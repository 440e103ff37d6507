"""Scores against the number that ends the names of students."""

import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import ACCURACY, ECE, scored, write

from distill_jax.report import series

CORRECT = {
  "online": 32,
  "top.4": 33,
  "top.16": 35,
  "top.1": 31,
  "draws.1": 30,
  "draws.2": 29,
  "other.x": 28,
  "v0.25": 28,
  "v0.5": 29,
  "v0.75": 30,
}


def entry(role, seed, correct, variant=""):
  scores = {"accuracy": correct / 40, "ece": 1 - correct / 40}
  return scored(role, seed, 0.0, variant)._replace(scores=scores)


@pytest.fixture
def entries():
  others = [entry("teacher", 0, 39), entry("baseline", 0, 30), entry("baseline", 1, 28)]
  return others + [
    entry("student", seed, n + seed, name) for name, n in CORRECT.items() for seed in (0, 1)
  ]


def test_names_that_end_in_three_numbers_are_a_series(entries):
  by_name = series.series(entries)
  assert {name: [*numbers] for name, numbers in by_name.items()} == {"top": [1, 4, 16]}
  assert by_name["top"][4].variant == "top.4"


def test_curve_joins_the_means_in_the_order_of_the_numbers(entries):
  drawing = series.score_against_number(entries, [ACCURACY, ECE])
  accuracy, calibration = drawing.axes
  lines = {container.get_label(): container[0] for container in accuracy.containers}
  x, y = (np.array(lines["top"].get_data()[axis], float) for axis in (0, 1))
  np.testing.assert_allclose(x, [1, 4, 16])
  np.testing.assert_allclose(y, [31.5 / 0.4, 33.5 / 0.4, 35.5 / 0.4])
  levels = {line.get_label(): line.get_ydata()[0] for line in accuracy.lines[:3]}
  expected = {"Teacher": 39 / 0.4, "Baseline": 29 / 0.4, "online": 32.5 / 0.4}
  assert levels == pytest.approx(expected)
  assert accuracy.get_ylabel() == "test accuracy, %"
  assert calibration.get_ylabel() == "test expected calibration error, %"
  errors = np.array(calibration.containers[0][0].get_ydata(), float)
  np.testing.assert_allclose(errors, 100 - y)
  colors = [line.get_color() for line in (lines["top"], *accuracy.lines[:3])]
  assert len(set(colors)) == 4


def test_without_calibration_there_is_one_panel(entries, tmp_path):
  assert len(series.score_against_number(entries, [ACCURACY]).axes) == 1
  assert series.score_against_number(entries[:5], [ACCURACY]) is None
  _, markdown, _ = write(tmp_path, entries)
  assert "](series.png)" in markdown and np.ptp(imread(tmp_path / "series.png")) > 0
