"""Spreads over seeds, paired differences, and the checks of a report's arguments."""

import dataclasses

import numpy as np
import pytest
from report_cases import ACCURACY, CLASSIFICATION, REFERENCES, make_task, scored

from distill_jax import report
from distill_jax.report import entries as e

BASELINE, STUDENT = e.Group("baseline"), e.Group("student")


def test_differences_are_paired_by_seed():
  entries = [
    scored("baseline", 1, 0.50),
    scored("baseline", 2, 0.70),
    scored("student", 2, 0.71),
    scored("student", 3, 0.99),
  ]
  change = e.gain(entries, STUDENT, "accuracy")
  assert change == (pytest.approx(0.01), None, 1, None)
  assert e.gain([entries[0], entries[3]], STUDENT, "accuracy") is None
  seeds = {group: entry.seed for group, entry in e.one_per_group(entries).items()}
  assert seeds == {BASELINE: 2, STUDENT: 2}


def test_one_per_group_prefers_a_seed_that_all_students_share():
  entries = [scored("teacher", 9, 0.9), scored("baseline", 0, 0.5), scored("student", 7, 0.5)]
  assert [entry.seed for entry in e.one_per_group(entries).values()] == [9, 0, 7]


def test_spread_is_the_sample_standard_deviation():
  assert e.spread([]) is None
  assert e.spread([2.0]) == (2.0, None, 1, None)
  values = [1.0, 2.0, 4.0]
  assert e.spread(values)[:3] == pytest.approx((np.mean(values), np.std(values, ddof=1), 3))


def test_costs_and_scores_are_values():
  entry = scored("student", 0, 0.5, cost={"flops": 2.0})
  assert entry.values == {"accuracy": 0.5, "flops": 2.0}
  assert e.over_seeds([entry], STUDENT, "flops").mean == 2.0


STUDENT_3 = scored("student", 3, 0.5)
LONG = {"class": np.zeros(9)}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"entries": []}, "entries"),
    ({"entries": [scored("studnet", 3, 0.5)]}, "role: .*'student'"),
    ({"entries": [STUDENT_3] * 2}, "entries: .*'student' of seed 3"),
    ({"entries": [STUDENT_3._replace(variant="a$b")]}, "variant"),
    ({"entries": [STUDENT_3._replace(variant="a" * 25)]}, "variant: .* 24"),
    ({"entries": [STUDENT_3._replace(variant=" a")]}, "variant"),
    ({"entries": [scored("baseline", 3, 0.5, "x")]}, "variant: .*'x'"),
    ({"entries": [STUDENT_3._replace(predictions=LONG)]}, r"predictions\['class'\]: .* 80 .* 9"),
    ({"entries": [STUDENT_3._replace(scores={"f1": 1.0})]}, r"'accuracy' \(task.metrics\[0\]\)"),
    ({"entries": [STUDENT_3._replace(cost={"accuracy": 1.0})]}, r"task.metrics: .*'accuracy'"),
    ({"references": {"label": np.zeros(9), "id": np.zeros(8)}}, "references: .*'id': 8"),
    ({"task": make_task()}, "task.metrics"),
    (
      {"task": make_task(dataclasses.replace(ACCURACY, format=".2x"))},
      "task.metrics: 'accuracy': format",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_rejected(change, message, tmp_path):
  valid = {
    "entries": [STUDENT_3],
    "task": CLASSIFICATION,
    "references": REFERENCES,
    "run": {},
  }
  arguments = valid | change
  with pytest.raises(ValueError, match=message):
    report.write(tmp_path / "x", arguments.pop("entries"), **arguments)
  assert not (tmp_path / "x").exists()
