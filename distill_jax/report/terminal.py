"""Writes the outcome of a run as lines of plain text, for a terminal of 80 columns."""

import textwrap
from collections.abc import Sequence

from distill_jax.report import comparison, variants
from distill_jax.report.document import Table
from distill_jax.report.entries import Entry, gain, groups, over_seeds, students
from distill_jax.report.numbers import (
  arrow,
  axis_label,
  difference,
  formatter,
  integer,
  mean,
)
from distill_jax.report.style import STUDENTS
from distill_jax.types import Metric

WIDTH = 80


def outcome(entries: Sequence[Entry], metric: Metric, examples: int | None) -> str:
  """Returns a table with a row per network, and the verdict.

  Args:
    entries: the networks.
    metric: the one that heads the report.
    examples: number of test examples; None: unknown.

  >>> from distill_jax import report, tasks
  >>> entries = [
  ...   report.Entry(role, seed, {"accuracy": score + 0.01 * seed}, {}, history=[])
  ...   for role, score in {"baseline": 0.90, "student": 0.93}.items()
  ...   for seed in range(3)
  ... ]
  >>> text = report.outcome(entries, tasks.classification().metrics[0], examples=None)
  >>> for line in text.splitlines()[:3]:  # the verdict follows
  ...   print(line)
                     Test accuracy, % ↑    − baseline  Parameters
  Baseline                 91.00 ± 1.00
  Student distilled        94.00 ± 1.00  +3.00 ± 0.00
  """
  if len(students(entries)) > STUDENTS:
    words = [variants.verdict(entries, metric)]
  else:
    words = comparison.verdicts(entries, metric, examples)
  paragraphs = [textwrap.fill(text, WIDTH) for text in words]
  return "\n\n".join([_lines(_table(entries, metric)), *paragraphs])


def _table(entries: Sequence[Entry], metric: Metric) -> Table:
  write = formatter(metric)
  title = f"Test {axis_label(metric)} {arrow(metric)}"
  rows = []
  for group in groups(entries):
    change = difference(write, gain(entries, group, metric.name)) if group.role == "student" else ""
    score = mean(write, over_seeds(entries, group, metric.name))
    parameters = over_seeds(entries, group, "parameters")
    size = "" if parameters is None else integer(parameters.mean)
    rows.append([group.variant or group.title, score, change, size])
  return Table(["", title, "− baseline", "Parameters"], rows)


def _lines(table: Table) -> str:
  """Returns the table in columns of equal width, the first one aligned left."""
  rows = [table.header, *table.rows]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    "  ".join(
      cell.rjust(width) if column else cell.ljust(width)
      for column, (cell, width) in enumerate(zip(row, widths))
    )
    for row in rows
  ]
  return "\n".join(line.rstrip() for line in lines)
