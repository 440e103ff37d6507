"""The table with a row per metric, and the sentences about the first metric."""

import dataclasses
import re
import statistics

import pytest
from report_cases import (
  ACCURACY,
  CLASSIFICATION,
  PERPLEXITY,
  REGRESSION,
  RMSE,
  UNMEASURED,
  cells,
  make_entries,
  make_variants,
  scored,
)

from distill_jax.report import comparison
from distill_jax.report.document import fragment
from distill_jax.report.numbers import axis_label, column_title, format_value

METRICS = CLASSIFICATION.metrics[:5]
TITLES = {
  "accuracy": "Test accuracy, % ↑",
  "f1": "Macro F1, % ↑",
  "nll": "Negative log-likelihood, nats ↓",
  "ece": "Expected calibration error, % ↓",
  "agreement": "Agreement with the teacher, % ↑",
}


def table(entries, metrics=METRICS, index=0):
  return cells(fragment(comparison.tables(entries, metrics)), index)


def numbers(cell):
  """Returns the numbers of 'mean ± deviation' or 'mean (low to high)'."""
  return tuple(map(float, re.findall(r"[-+]?\d+(?:\.\d+)?", cell.replace("−", "-"))))


def test_rows_have_spread_paired_difference_and_ratio():
  entries = make_entries()
  rows = table(entries)
  assert rows["Seeds"] == {
    "Teacher": "1",
    "Baseline": "3",
    "Student distilled": "3",
    "Distilled − baseline": "",
    "Distilled / teacher": "",
  }
  for name, title in TITLES.items():
    factor, unit = (100, 5.1e-3) if "%" in title else (1, 5.1e-5)
    by_role = {
      role: [factor * e.scores[name] for e in entries if e.role == role and name in e.scores]
      for role in ("teacher", "baseline", "student")
    }
    changes = [a - b for a, b in zip(by_role["student"], by_role["baseline"])]
    for column, values in [
      ("Baseline", by_role["baseline"]),
      ("Student distilled", by_role["student"]),
    ]:
      expected = statistics.mean(values), statistics.stdev(values)
      assert numbers(rows[title][column]) == pytest.approx(expected, abs=unit)
    half = 4.3027 * statistics.stdev(changes) / 3**0.5  # Student's t, 2 degrees of freedom
    center = statistics.mean(changes)
    expected = center, center - half, center + half
    assert numbers(rows[title]["Distilled − baseline"]) == pytest.approx(
      expected, rel=1e-4, abs=unit
    )
    if not by_role["teacher"]:
      assert rows[title]["Teacher"] == rows[title]["Distilled / teacher"] == "–"
      continue
    assert numbers(rows[title]["Teacher"]) == pytest.approx(by_role["teacher"], abs=unit)
    ratio = statistics.mean(by_role["student"]) / by_role["teacher"][0]
    assert float(rows[title]["Distilled / teacher"]) == pytest.approx(ratio, rel=5e-3)


def test_rows_of_costs():
  rows = table(make_entries())
  assert list(rows["Parameters"].values()) == ["8,000", "1,000", "1,000", "–", "0.125"]
  assert rows["Size, bytes"]["Baseline"] == "4 k"
  assert rows["FLOPs per example"]["Student distilled"] == "2.5 M"
  assert rows["Latency of one example, ms"]["Teacher"] == "0.250"
  assert rows["Throughput at batch 128, examples/s"]["Teacher"] == "12,346"


def test_several_students_have_a_second_table():
  entries = make_variants(["first", "second"])
  assert list(table(entries)["Seeds"]) == [
    "Teacher",
    "Baseline",
    "Distilled: first",
    "Distilled: second",
  ]
  changes = table(entries, index=1)
  assert "Seeds" not in changes
  row = changes["Test accuracy, % ↑"]
  assert list(row) == [
    "first − baseline",
    "second − baseline",
    "first / teacher",
    "second / teacher",
  ]
  # Two seeds: Student's t with one degree of freedom is 12.706.
  half = 12.706 * 0.05
  assert numbers(row["second − baseline"]) == pytest.approx(
    (2.05, 2.05 - half, 2.05 + half), abs=6e-3
  )


def test_large_ratios_are_integers():
  fast = [scored(role, 0, 0.9, cost={"throughput_128": 2.0}) for role in ("teacher", "student")]
  fast[1] = fast[1]._replace(cost={"throughput_128": 2469.0})
  (joined,) = comparison.tables(fast, METRICS[:1])
  assert joined.header == ["", "Teacher", "Student distilled", "Distilled / teacher"]
  assert joined.rows[-1][-1] == "1,234" and joined.rows[1][-1] == "1.00"


@pytest.mark.parametrize(
  "metric, value, text, label, column",
  [
    (ACCURACY, 0.91254, "91.25", "accuracy, %", "Test accuracy, % ↑"),
    (RMSE, 1.23456, "1.235", "RMSE, mm", "Test RMSE, mm ↓"),
    (PERPLEXITY, 34.7, "34.700", "perplexity", "Test perplexity ↓"),
    (
      dataclasses.replace(UNMEASURED, short="Sh"),
      -0.5,
      "−0.50",
      "score that no entry has",
      "Test Sh ↑",
    ),
  ],
)
def test_format_and_titles_follow_the_metric(metric, value, text, label, column):
  assert format_value(metric, value) == text
  assert axis_label(metric) == label
  assert column_title(metric, first=True) == column


@pytest.mark.parametrize(
  "metric, baseline, distilled, words",
  [
    (ACCURACY, [0.8, 0.82], [0.9, 0.93], ["2 seeds", "+10.50 points in test accuracy", "3 seeds"]),
    (ACCURACY, [0.8, 0.82, 0.81], [0.7, 0.72, 0.73], ["−9.33 points", "−12.20 to", "harmed"]),
    (ACCURACY, [0.8, 0.9, 0.85], [0.9, 0.85, 0.86], ["+2.00 points", "does not exclude 0"]),
    (ACCURACY, [0.8] * 3, [0.81] * 3, ["+1.00 points", "no effect"]),
    (ACCURACY, [0.8], [0.91], ["one seed", "+11.00 points", "(1,000 test examples)", "no spread"]),
    (ACCURACY, [], [0.91], ["No baseline"]),
    (ACCURACY, [0.8], [], ["No student was distilled"]),
    (RMSE, [2, 2.1, 2], [1, 1.2, 1.1], ["−0.933 mm in test RMSE", "−1.077 to −0.790", "helped"]),
    (RMSE, [2.0, 2.1, 2.0], [3.0, 3.2, 3.1], ["+1.067 mm", "harmed"]),
    (PERPLEXITY, [80.0, 81.0, 80.0], [60.0, 62.0, 61.0], ["−19.333 in test", "helped"]),
  ],
)  # fmt: skip
def test_verdict_follows_the_paired_difference(metric, baseline, distilled, words):
  entries = [scored("baseline", s, value, name=metric.name) for s, value in enumerate(baseline)]
  entries += [scored("student", s, value, name=metric.name) for s, value in enumerate(distilled)]
  (text,) = comparison.verdicts(entries, metric, 1000)
  assert all(word in text for word in words), text


def test_smaller_student_is_not_credited_to_distillation():
  sizes = {"baseline": 100, "student": 40}
  entries = [
    scored(role, seed, value + 0.01 * seed**2, cost={"nonzeros": sizes[role]})
    for role, value in (("baseline", 0.8), ("student", 0.7))
    for seed in (0, 1, 2)
  ]
  entries[3] = entries[3]._replace(scores={"accuracy": 0.701})
  (text,) = comparison.verdicts(entries, ACCURACY, None)
  assert "40 % of the parameters" in text and "worse" in text


def test_verdict_without_a_common_seed():
  entries = [scored("baseline", 1, 0.5), scored("student", 3, 0.9, "KD")]
  (text,) = comparison.verdicts(entries, ACCURACY, None)
  assert text.startswith("The distilled student (KD)") and "no seed" in text
  (only,) = comparison.tables(entries, [ACCURACY])
  assert only.header == ["", "Baseline", "Distilled: KD"]


def test_regression_rows_are_in_the_metrics_units():
  values = {"baseline": [2.0, 2.2], "student": [1.5, 1.6]}
  entries = [
    scored(role, seed, value, name="rmse")._replace(scores={"rmse": value, "r2": -0.25})
    for role, scores in values.items()
    for seed, value in enumerate(scores)
  ]
  rows = table(entries, REGRESSION.metrics)
  # Student's t with one degree of freedom: 12.706 times 0.05.
  assert rows["Test RMSE, mm ↓"]["Distilled − baseline"] == "−0.550 (−1.185 to +0.085)"
  assert rows["R² ↑"]["Baseline"] == "−0.2500 ± 0.0000"
