"""Confidence intervals: against SciPy, against the error of a mean, and by their coverage."""

import numpy as np
import pytest
from report_cases import scored
from scipy import stats

from distill_jax.report import entries as e
from distill_jax.report.intervals import example_error, interval


def leave_out(values, parts):
  """Returns the mean without each of some parts of the values, in parallel over leading axes."""
  sums = values.reshape(*values.shape[:-1], parts, -1).sum(-1)
  left = values.shape[-1] * (parts - 1) / parts
  return (sums.sum(-1, keepdims=True) - sums) / left


def test_over_seeds_alone_it_is_student_s():
  values = [0.01, 0.05, 0.03, 0.02]
  expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
  assert interval(values, []) == pytest.approx(expected, rel=1e-12)
  assert interval([0.01], []) is None
  assert interval([0.01, 0.01], []) is None  # Nothing tells how far chance reaches.


def test_error_over_examples_is_that_of_the_mean():
  values = np.random.default_rng(0).normal(size=300)
  assert example_error(leave_out(values, 300)) == pytest.approx(stats.sem(values), rel=1e-12)


def test_error_of_a_score_that_is_no_mean_agrees_with_the_bootstrap():
  rng = np.random.default_rng(1)
  correct, rare = rng.random(2000) < 0.8, rng.random(2000) < 0.2

  def balanced(rows):
    return np.mean([correct[rows][rare[rows] == group].mean() for group in (False, True)])

  parts = np.arange(2000).reshape(100, 20)
  scores = [balanced(np.delete(parts, k, axis=0).ravel()) for k in range(100)]
  resampled = [balanced(rng.integers(0, 2000, 2000)) for _ in range(1000)]
  assert example_error(np.array(scores)) == pytest.approx(np.std(resampled), rel=0.15)


def test_equal_differences_of_all_seeds_have_the_error_over_examples():
  changes = np.random.default_rng(2).choice([-1.0, 0, 1], 100, p=[0.1, 0.7, 0.2])
  parts = leave_out(changes, 100)
  low, high = interval([changes.mean()] * 3, [parts] * 3)
  half = stats.t.ppf(0.975, 99) * stats.sem(changes)
  assert (low, high) == pytest.approx((changes.mean() - half, changes.mean() + half))
  assert interval([0.0] * 3, [np.zeros(50)] * 3) == (0, 0)


def test_it_covers_the_true_effect_19_times_in_20():
  # A seed moves every example; an example's own difference is shared by the seeds in part.
  rng = np.random.default_rng(3)
  hits = 0
  for _ in range(600):
    seeds = rng.normal(0.3, 0.03, (3, 1))
    examples = rng.normal(size=(1, 400)) + 0.7 * rng.normal(size=(3, 400))
    changes = seeds + examples
    low, high = interval(changes.mean(1).tolist(), list(leave_out(changes, 100)))
    hits += low < 0.3 < high
  assert 0.93 < hits / 600 < 0.99


def test_gain_reads_both_sides_parts_of_the_same_examples():
  student, baseline = np.linspace(0.8, 0.9, 20), np.linspace(0.8, 0.9, 20)
  entries = [
    scored(role, seed, level + 0.01 * seed, leave_out={"accuracy": parts})
    for role, level, parts in (("baseline", 0.85, baseline), ("student", 0.87, student))
    for seed in range(3)
  ]
  # Parts that move both networks alike say nothing of their difference.
  change = e.gain(entries, e.Group("student"), "accuracy")
  assert change.interval == pytest.approx((0.02, 0.02)) and change.sign == 1
  assert e.gain(entries[:2] + entries[3:5], e.Group("student"), "accuracy").sign == 0
  entries[3] = entries[3]._replace(leave_out={"accuracy": student[::-1]})
  assert e.gain(entries, e.Group("student"), "accuracy").sign == 0
