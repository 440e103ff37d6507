"""The outcome of a run as plain text."""

import pytest
from report_cases import ACCURACY, PERPLEXITY, make_entries, make_variants, scored

from distill_jax import report


def test_a_row_per_network_within_80_columns():
  entries = make_entries()
  lines = report.outcome(entries, ACCURACY, 359).splitlines()
  assert max(map(len, lines)) <= 80
  header, teacher, baseline, student, _, *words = lines
  assert teacher.split()[:2] == ["Teacher", f"{100 * entries[0].scores['accuracy']:.2f}"]
  assert baseline.startswith("Baseline") and "±" in baseline and baseline.endswith("1,000")
  # Numbers stand under the end of their title.
  assert student.index(" to ") < header.index("− baseline") + len("− baseline")
  assert "359 test examples" in " ".join(words)


def test_many_students_have_a_row_each_and_one_verdict():
  names = [f"v{number}" for number in range(8)]
  text = report.outcome(make_variants(names, seeds=(0, 1, 2)), ACCURACY, None)
  assert all(f"\n{name} " in text for name in names) and text.count("distilled students") == 1


@pytest.mark.parametrize("role", ["teacher", "baseline"])
def test_a_run_without_students_has_a_table(role):
  text = report.outcome([scored(role, 0, 12.5, name="perplexity")], PERPLEXITY, None)
  assert "12.500" in text and "No student" in text
