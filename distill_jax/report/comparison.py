"""Compares the networks of a run: tables with a row per metric and cost, and sentences."""

from collections.abc import Sequence
from typing import NamedTuple

from distill_jax.report.document import Table
from distill_jax.report.entries import (
  BATCH,
  MIN_SEEDS,
  Entry,
  Group,
  Spread,
  gain,
  groups,
  of_group,
  over_seeds,
  pairs,
  shared_seeds,
  students,
)
from distill_jax.report.numbers import (
  MISSING,
  Formatter,
  capitalized,
  difference,
  difference_unit,
  formatter,
  integer,
  limits,
  mean,
  row_title,
  si_prefix,
  signed,
  three_decimals,
)
from distill_jax.types import Metric

_BASELINE = Group("baseline")


class _Row(NamedTuple):
  """A row of a table: the name of a score or cost, its title and how it is written.

  Attributes:
    is_score: scores have a paired difference, costs do not.
    varies: whether seeds differ; a cost that does not is written without spread.
  """

  name: str
  title: str
  write: Formatter
  is_score: bool = False
  varies: bool = False


_COSTS = (
  _Row("parameters", "Parameters", integer),
  _Row("nonzeros", "Nonzero parameters", integer, varies=True),
  _Row("bytes", "Size, bytes", si_prefix),
  _Row("disk", "On disk, bytes", si_prefix),
  _Row("compressed", "On disk, compressed, bytes", si_prefix, varies=True),
  _Row("flops", "FLOPs per example", si_prefix),
  _Row("latency_ms", "Latency of one example, ms", three_decimals),
  _Row(f"throughput_{BATCH}", f"Throughput at batch {BATCH}, examples/s", integer, varies=True),
  _Row(f"generation_{BATCH}", f"Generation at batch {BATCH}, sequences/s", integer, varies=True),
)


def tables(
  entries: Sequence[Entry], metrics: Sequence[Metric], *, costs: bool = True
) -> list[Table]:
  """Returns scores, their paired differences to the baseline and their ratios to the teacher.

  Several distilled students get their differences and ratios in a second table.

  Args:
    entries: the networks.
    metrics: a row each.
    costs: whether the costs have rows, too.
  """
  rows = [*_rows(metrics), *(_COSTS if costs else ())]
  rows = [row for row in rows if any(row.name in entry.values for entry in entries)]
  scores = _scores(entries, rows)
  changes = _changes(entries, rows)
  if len(changes.header) == 1:
    return [scores]
  if len(students(entries)) > 1:
    return [scores, Table(changes.header, changes.rows[1:])]
  joined = [[*left, *right[1:]] for left, right in zip(scores.rows, changes.rows)]
  return [Table([*scores.header, *changes.header[1:]], joined)]


def verdicts(entries: Sequence[Entry], metric: Metric, examples: int | None) -> list[str]:
  """Returns a paragraph per distilled student: its change, with the interval over seeds and test
  examples.

  It says that distillation helped or harmed where there are at least three seeds and the interval
  excludes 0.

  Args:
    entries: the networks.
    metric: the task's first metric.
    examples: number of test examples; None: unknown.
  """
  if not students(entries):
    return ["No student was distilled in this run."]
  if _BASELINE not in groups(entries):
    return ["No baseline was trained, so this run cannot show what distillation changed."]
  return [_verdict(entries, group, metric, examples) for group in students(entries)]


def _verdict(entries: Sequence[Entry], group: Group, metric: Metric, examples: int | None) -> str:
  name = f"the distilled student ({group.variant})" if group.variant else "the distilled student"
  change = gain(entries, group, metric.name)
  if change is None:
    return f"{capitalized(name)} and the baseline share no seed, so there is no paired difference."
  amount = f"{name} differs from the baseline by {_amount(metric, change.mean)}"
  tested = f"{examples:,} test examples" if examples else "the test examples"
  if change.number == 1:
    return (
      f"With one seed, {amount} ({tested}). One seed has no spread: "
      "only more seeds can show whether this is more than chance."
    )
  text = f"Over {change.number} seeds, {amount}"
  if change.interval is None:
    text += f" ({tested})"
  else:
    with_parts = all(metric.name in e.leave_out for pair in pairs(entries, group) for e in pair)
    over = f"seeds and {tested}" if with_parts else f"seeds, on {tested}"
    between = limits(formatter(metric), change.interval)
    text += f" (95 % confidence interval over {over}: {between})"
  return f"{text}. {_conclusion(entries, group, metric, change)}"


def _conclusion(entries: Sequence[Entry], group: Group, metric: Metric, change: Spread) -> str:
  if change.number < MIN_SEEDS:
    return f"At least {MIN_SEEDS} seeds are needed to tell whether this is more than chance."
  if not change.sign:
    return (
      "The interval does not exclude 0: this run does not show that distillation matters."
      if change.interval
      else "All seeds agree, and nothing tells how far chance reaches: this run shows no effect."
    )
  is_better = (change.sign > 0) == (metric.better == "max")
  size = _relative_size(entries, group)
  if size is not None and abs(size - 1) > 0.01:
    return (
      "The interval excludes 0: this student, which has "
      f"{100 * size:.0f} % of the parameters, is {'better' if is_better else 'worse'}."
    )
  effect = "helped" if is_better else "harmed"
  return f"The interval excludes 0: distillation {effect} this student."


def _relative_size(entries: Sequence[Entry], group: Group) -> float | None:
  """Returns the student's nonzero parameters over the baseline's."""
  student = over_seeds(entries, group, "nonzeros")
  baseline = over_seeds(entries, _BASELINE, "nonzeros")
  if student is None or baseline is None or not baseline.mean:
    return None
  return student.mean / baseline.mean


def _amount(metric: Metric, change: float) -> str:
  return f"{_with_unit(metric, signed(formatter(metric), change))} in test {metric.title}"


def _with_unit(metric: Metric, text: str) -> str:
  return " ".join(filter(None, [text, difference_unit(metric)]))


def _rows(metrics: Sequence[Metric]) -> list[_Row]:
  return [
    _Row(metric.name, row_title(metric, first=metric == metrics[0]), formatter(metric), True, True)
    for metric in metrics
  ]


def _scores(entries: Sequence[Entry], rows: Sequence[_Row]) -> Table:
  columns = groups(entries)
  seeds = ["Seeds", *(str(len(of_group(entries, group))) for group in columns)]
  cells = [
    [row.title, *(_cell(row, over_seeds(entries, group, row.name)) for group in columns)]
    for row in rows
  ]
  return Table(["", *(group.title for group in columns)], [seeds, *cells])


def _changes(entries: Sequence[Entry], rows: Sequence[_Row]) -> Table:
  distilled = students(entries)
  compared = [group for group in distilled if shared_seeds(entries, group)]
  has_teacher = any(entry.role == "teacher" for entry in entries)
  ratios = distilled if has_teacher else []
  header = [
    "",
    *(f"{_short(group)} − baseline" for group in compared),
    *(f"{_short(group)} / teacher" for group in ratios),
  ]
  lines = [["Seeds", *[""] * (len(header) - 1)]]
  for row in rows:
    changes = [gain(entries, group, row.name) if row.is_score else None for group in compared]
    teacher = over_seeds(entries, Group("teacher"), row.name)
    lines.append(
      [
        row.title,
        *(difference(row.write, change) for change in changes),
        *(_ratio(over_seeds(entries, group, row.name), teacher) for group in ratios),
      ]
    )
  return Table(header, lines)


def _short(group: Group) -> str:
  return group.variant or "Distilled"


def _cell(row: _Row, spread: Spread | None) -> str:
  # Networks with equal programs have one measured cost.
  is_constant = not row.varies or (not row.is_score and spread is not None and not spread.deviation)
  if spread is not None and is_constant:
    return row.write(spread.mean)
  return mean(row.write, spread)


def _ratio(student: Spread | None, teacher: Spread | None) -> str:
  if student is None or teacher is None or not teacher.mean:
    return MISSING
  ratio = student.mean / teacher.mean
  return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:#.3g}"
