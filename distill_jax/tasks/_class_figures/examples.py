"""Chooses the test examples that a report shows, and the networks that it shows them of."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from distill_jax.report.entries import Entry, Group, one_per_group, pairs, students

_EACH = 2  # examples of each kind
TITLES = {"teacher": "Teacher", "baseline": "Baseline", "student": "Distilled"}


def choose(gain: np.ndarray) -> dict[int, str]:
  """Returns {row: reason}: the examples with the largest gains and losses, and random ones.

  Args:
    gain: of each example, float [N]; NaN of those without a score. Where all are 0 or NaN the rows
      are random.
  """
  scored = np.flatnonzero(~np.isnan(gain))
  order = scored[np.argsort(-gain[scored], kind="stable")]
  rows = {row: "largest gain" for row in order[:_EACH].tolist() if gain[row] > 0}
  rows |= {row: "largest loss" for row in order[::-1][:_EACH].tolist() if gain[row] < 0}
  rest = [row for row in np.random.default_rng(0).permutation(scored).tolist() if row not in rows]
  return rows | dict.fromkeys(rest[: 3 * _EACH - len(rows)], "random")


def gain_of(scores: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns the distilled student's score minus the baseline's of each example; 0 without both, NaN
  without a label.

  Args:
    scores: float [N] of each role.
  """
  if {"student", "baseline"} <= set(scores):
    return scores["student"] - scores["baseline"]
  return 0 * next(iter(scores.values()))


def networks(entries: Sequence[Entry]) -> dict[Group, Entry]:
  """Returns one entry per role, the last distilled student and the baseline of its seed."""
  by_group = one_per_group(entries)
  shown = {group: entry for group, entry in by_group.items() if group.role != "student"}
  distilled = students(entries)
  if distilled:
    shown[distilled[-1]] = by_group[distilled[-1]]
    matched = pairs(entries, distilled[-1])
    if matched:
      student, baseline = matched[0]
      shown |= {student.group: student, baseline.group: baseline}
  return shown


def rule(number: int, shown: Iterable[Group], score: str) -> str:
  """Returns a sentence on how the examples were chosen.

  Args:
    number: of test examples.
    shown: the groups of the networks.
    score: of an example, in words.
  """
  if not {"student", "baseline"} <= {group.role for group in shown}:
    return f"{3 * _EACH} random test examples."
  name = next(group.variant for group in shown if group.role == "student")
  return (
    f"Of the {number} test examples the {_EACH} whose {score} gains most by distillation"
    f"{f' ({name})' if name else ''}, the {_EACH} that lose most, and {_EACH} random ones; more "
    "random ones where fewer gain or lose."
  )


def seeds_of(entries: Iterable[Entry]) -> str:
  """Returns the seeds of the networks that are shown, such as '0, 2'."""
  return ", ".join(map(str, sorted({entry.seed for entry in entries})))
