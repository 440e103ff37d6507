"""Compares many distilled students: a table with a row for each, words on the first ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.report.document import Table
from distill_jax.report.entries import (
  BATCH,
  MIN_SEEDS,
  Entry,
  Group,
  gain,
  groups,
  over_seeds,
  students,
)
from distill_jax.report.numbers import (
  MISSING,
  Formatter,
  column_title,
  difference,
  formatter,
  integer,
  mean,
  si_prefix,
  three_decimals,
)
from distill_jax.report.style import STUDENTS
from distill_jax.types import Metric

_GENERATION = f"generation_{BATCH}"
_COSTS: Sequence[tuple[str, str, Formatter]] = (
  ("parameters", "Parameters ↓", integer),
  ("nonzeros", "Not zero ↓", integer),
  ("compressed", "On disk, compressed, bytes ↓", si_prefix),
  ("flops", "FLOPs ↓", si_prefix),
  ("latency_ms", "Latency, ms ↓", three_decimals),
  (f"throughput_{BATCH}", f"Examples/s at batch {BATCH} ↑", integer),
  (_GENERATION, f"Sequences/s at batch {BATCH} ↑", integer),
)
_TIMES = ("latency_ms", f"throughput_{BATCH}", _GENERATION)
MAX_SPREAD = 2  # between the quartiles of times that can be believed
# A batch is as fast as its examples one by one, or faster. On a CPU a large network's may be a
# little slower, as fewer of its values fit into the caches.
MIN_SPEEDUP = 0.7


def in_rows(entries: Sequence[Entry]) -> bool:
  """Returns whether students are table rows: they are timed, differ in size, or outnumber looks."""
  return is_timed(entries) or differ_in_size(entries) or len(students(entries)) > STUDENTS


def table(
  entries: Sequence[Entry],
  metrics: Sequence[Metric],
  run: Mapping[str, Any],
  *,
  brief: bool = False,
  costs: bool | None = None,
) -> Table:
  """Returns a table with a row per group.

  Args:
    entries: the networks.
    metrics: the task's metrics; `Metric.detail` decides which are columns.
    run: what was run; its setting 'reference' names the variant that step times are divided by.
    brief: whether the table covers several runs: it has no measured times, which other programs on
      the machine change, and only metrics of `detail` 0.
    costs: whether it has columns of costs; None: where students differ in size. How fast networks
      generate sequences is always one, but in brief.
  """
  first, *others = metrics
  others = [m for m in others if m.detail <= (0 if brief else 1) and _is_measured(entries, m)]
  show_costs = differ_in_size(entries) if costs is None else costs
  has_generation = any(_GENERATION in entry.cost for entry in entries)
  costs_shown = [
    row
    for row in _COSTS
    if (has_generation if row[0] == _GENERATION else show_costs)
    and not (brief and row[0] in _TIMES)
  ]
  header = ["Method", column_title(first, first=True), "− baseline"]
  header += [column_title(metric, first=False) for metric in others]
  header += [title for _, title, _ in costs_shown]
  timed = is_timed(entries)
  if timed:
    header.append(f"Step time / {run.get('settings', {}).get('reference') or 'reference'} ↓")
  rows = []
  for group in groups(entries):
    row = _scores(entries, group, first, others)
    row += [_cost(entries, group, name, write) for name, _, write in costs_shown]
    rows.append([*row, _step_ratio(entries, group)] if timed else row)
  return Table(header, rows)


def differ_in_size(entries: Sequence[Entry]) -> bool:
  """Returns whether nonzero parameters differ by more than 1 %, more than zeros by chance."""
  costs = [entry.values for entry in entries if entry.role != "teacher"]
  sizes = [cost["nonzeros"] for cost in costs if "nonzeros" in cost]
  return bool(sizes) and min(sizes) < 0.99 * max(sizes)


def is_timed(entries: Sequence[Entry]) -> bool:
  """Returns whether train steps were timed."""
  return any("step_ratio" in entry.values for entry in entries)


def about_time(entries: Sequence[Entry]) -> str:
  """Returns a sentence on how step times were measured; empty where the table has none."""
  if not is_timed(entries):
    return ""
  return "Step time: medians of one train step's time, both sides by turns in one process."


def about_speed(entries: Sequence[Entry]) -> str:
  """Returns sentences on how latency and throughput were measured, and whether to believe them."""
  costs = [entry.values for entry in entries]
  spreads = [
    cost[f"{name}_spread"] for cost in costs for name in _TIMES if f"{name}_spread" in cost
  ]
  if not spreads:
    return ""
  text = (
    "Latency and throughput: medians of runs of all networks by turns; of the middle half of the "
    f"runs the slowest took at most {max(spreads):.2f} times as long as the fastest."
  )
  latency, throughput, _ = _TIMES
  contradict = any(
    cost[throughput] * cost[latency] < 1e3 * MIN_SPEEDUP
    for cost in costs
    if latency in cost and throughput in cost
  )
  if contradict:
    text += " A batch took longer than its examples one by one"
  elif max(spreads) > MAX_SPREAD:
    text += " That is much"
  else:
    return text
  return f"{text}: the machine was busy, so measure again with --stages=report."


def few(entries: Sequence[Entry]) -> list[Entry]:
  """Returns teacher, baseline and the first students, as many as pictures can distinguish."""
  first = students(entries)[:STUDENTS]
  return [entry for entry in entries if entry.role != "student" or entry.group in first]


def verdict(entries: Sequence[Entry], metric: Metric) -> str:
  """Returns a sentence: for how many students the interval of the change excludes 0."""
  changes = [gain(entries, group, metric.name) for group in students(entries)]
  sign = 1 if metric.better == "max" else -1
  signs = [sign * change.sign for change in changes if change and change.number >= MIN_SEEDS]
  if len(signs) < len(changes):
    return (
      f"{len(changes)} students were distilled; not all share {MIN_SEEDS} seeds with the baseline, "
      "which it takes to tell a difference from chance."
    )
  better, worse = signs.count(1), signs.count(-1)
  return (
    f"Of {len(signs)} distilled students {better} are better and {worse} worse than the baseline: "
    "the 95 % confidence interval of the difference excludes 0. For "
    f"{len(signs) - better - worse} it does not. About one in twenty differs by chance."
  )


def left_out(entries: Sequence[Entry]) -> str:
  """Returns a sentence: which students the words and pictures below the table cover."""
  distilled = students(entries)
  return (
    f"Words and pictures below are about the first {STUDENTS} of {len(distilled)} distilled "
    f"students: {', '.join(group.variant for group in distilled[:STUDENTS])}."
  )


def _is_measured(entries: Sequence[Entry], metric: Metric) -> bool:
  return any(metric.name in entry.scores for entry in entries)


def _scores(
  entries: Sequence[Entry], group: Group, first: Metric, others: Sequence[Metric]
) -> list[str]:
  change = ""
  if group.role == "student":
    change = difference(formatter(first), gain(entries, group, first.name))
  spreads = [(metric, over_seeds(entries, group, metric.name)) for metric in (first, *others)]
  leading, *further = [mean(formatter(metric), spread) for metric, spread in spreads]
  return [group.variant or group.title, leading, change, *further]


def _cost(entries: Sequence[Entry], group: Group, name: str, write: Formatter) -> str:
  spread = over_seeds(entries, group, name)
  return MISSING if spread is None else write(spread.mean)


def _step_ratio(entries: Sequence[Entry], group: Group) -> str:
  return _cost(entries, group, "step_ratio", lambda ratio: f"{ratio:.2f}")
