"""Holds the scores of trained networks; computes their spread over seeds and paired differences."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import suggest
from distill_jax.report.intervals import interval
from distill_jax.types import Metric

ROLES = {"teacher": "Teacher", "baseline": "Baseline", "student": "Student distilled"}
BATCH = 128  # examples in a batch when a network's throughput is measured
MIN_SEEDS = 3
"""Seeds from which on a difference is called better or worse: two may agree by chance."""
MAX_VARIANT = 24  # characters of a variant's name: it is part of headers and legends


class Group(NamedTuple):
  """The networks of one role and variant, which differ only in their seed."""

  role: str
  variant: str = ""

  @property
  def title(self) -> str:
    """Returns the group's name for headers and legends."""
    return f"Distilled: {self.variant}" if self.variant else ROLES[self.role]

  @property
  def name(self) -> str:
    """Returns the group's key in results.json."""
    return f"{self.role}: {self.variant}" if self.variant else self.role


class Entry(NamedTuple):
  """One trained network.

  Attributes:
    role: 'teacher', 'baseline' (the student trained without the teacher) or 'student' (distilled).
    seed: seed of its training; baseline and student are compared seed by seed.
    scores: {metric name: value} on the test split, as the task computes them, with those that
      compare the network with its teacher.
    cost: 'parameters', 'bytes', 'flops', 'latency_ms', 'throughput_128', 'generation_128';
      'nonzeros', 'disk' and 'compressed' (`compression.sizes`); 'step_ratio', the time of a train
      step over that of the run's reference. Any may be missing.
    history: lines of metrics.jsonl: {'step', 'phase': 'train' | 'validation', 'loss', metric names
      ...}; may be empty.
    variant: name that distinguishes the distilled students of one seed ('generation 1'); empty for
      other roles. Reports keep the order in which variants first occur; where only one fits, they
      show the last.
    statistics: the task's added sums over the test split (host arrays), for `Task.figures`; None:
      there are none.
    predictions: {name: array} with one row per test example, for `Task.figures`; None: there are
      none.
    text: text that the report prints for this network, such as text that it wrote; may be empty.
    layers: zeros of each array (`compression.sizes.layer_zeros`); may be empty.
    leave_out: {metric name: its scores without each of K parts of the test examples, float [K]}
      (`train.Evaluated.leave_out`), for intervals; may be empty.

  >>> from distill_jax.report import Entry
  >>> entry = Entry("student", 0, {"accuracy": 0.92}, {"parameters": 2000}, history=[])
  >>> entry.values
  {'accuracy': 0.92, 'parameters': 2000}
  """

  role: str
  seed: int
  scores: Mapping[str, float]
  cost: Mapping[str, float]
  history: Sequence[Mapping[str, Any]]
  variant: str = ""
  statistics: Mapping[str, Any] | None = None
  predictions: Mapping[str, np.ndarray] | None = None
  text: str = ""
  layers: Sequence[Any] = ()
  leave_out: Mapping[str, np.ndarray] = {}

  @property
  def group(self) -> Group:
    """Returns the entry's role and variant."""
    return Group(self.role, self.variant)

  @property
  def values(self) -> dict[str, float]:
    """Returns scores and costs by name."""
    return {**self.scores, **self.cost}


class Spread(NamedTuple):
  """The mean over `number` seeds and their sample standard deviation (None: one seed).

  Attributes:
    interval: of a difference, its 95 % confidence interval over seeds and test examples; or None.
  """

  mean: float
  deviation: float | None
  number: int
  interval: tuple[float, float] | None = None

  @property
  def sign(self) -> int:
    """Returns 1 or -1 where at least `MIN_SEEDS` seeds have an interval that excludes 0, else 0."""
    if self.number < MIN_SEEDS or self.interval is None:
      return 0
    low, high = self.interval
    return int(low > 0) - int(high < 0)


def check(
  entries: Sequence[Entry], metrics: Sequence[Metric], references: Mapping[str, Any]
) -> None:
  """Checks that the arguments of a report fit one another.

  Args:
    entries: the networks of the run.
    metrics: the task's metrics.
    references: {name: array over all test examples, or None}.

  Raises:
    ValueError: names the first argument that does not fit.
  """
  if not entries:
    raise ValueError("entries: expected at least one trained network, got none")
  _check_metrics(entries, metrics)
  rows = _num_rows(references)
  for entry in entries:
    _check_entry(entry, rows)
  keys = Counter((entry.group, entry.seed) for entry in entries)
  for (group, seed), number in keys.items():
    if number > 1:
      raise ValueError(
        f"entries: expected one {group.name!r} of seed {seed}, got {number}: "
        "give each distilled student its own variant"
      )


def groups(entries: Iterable[Entry]) -> list[Group]:
  """Returns the entries' groups by role; those of one role in the order of first occurrence."""
  order = list(ROLES)
  unique = dict.fromkeys(entry.group for entry in entries)
  return sorted(unique, key=lambda group: order.index(group.role))


def students(entries: Sequence[Entry]) -> list[Group]:
  """Returns the groups of distilled students."""
  return [group for group in groups(entries) if group.role == "student"]


def of_group(entries: Iterable[Entry], group: Group) -> list[Entry]:
  """Returns the entries of one group, one per seed."""
  return [entry for entry in entries if entry.group == group]


def over_seeds(entries: Sequence[Entry], group: Group, name: str) -> Spread | None:
  """Returns the spread of one score or cost over a group's seeds; None where no entry has it."""
  values = [entry.values for entry in of_group(entries, group)]
  return spread([by_name[name] for by_name in values if name in by_name])


def gain(entries: Sequence[Entry], group: Group, name: str) -> Spread | None:
  """Returns distilled minus baseline, paired by seed; None where no seed has both."""
  both = [pair for pair in pairs(entries, group) if all(name in entry.values for entry in pair)]
  values = [student.values[name] - baseline.values[name] for student, baseline in both]
  change = spread(values)
  if change is None:
    return None
  has_parts = all(name in entry.leave_out for pair in both for entry in pair)
  parts = [s.leave_out[name] - b.leave_out[name] for s, b in both] if has_parts else []
  return change._replace(interval=interval(values, parts))


def pairs(entries: Sequence[Entry], group: Group) -> list[tuple[Entry, Entry]]:
  """Returns (distilled student, baseline) for each seed that has both."""
  by_key = {(entry.group, entry.seed): entry for entry in entries}
  baseline = Group("baseline")
  return [(by_key[group, s], by_key[baseline, s]) for s in shared_seeds(entries, group)]


def shared_seeds(entries: Sequence[Entry], group: Group) -> list[int]:
  """Returns the seeds for which both the distilled student and the baseline were trained."""
  distilled = {entry.seed for entry in of_group(entries, group)}
  baseline = {entry.seed for entry in of_group(entries, Group("baseline"))}
  return sorted(distilled & baseline)


def one_per_group(entries: Sequence[Entry]) -> dict[Group, Entry]:
  """Returns one entry per group, of the first seed that all students share.

  A group without that seed has the entry of its first seed.
  """
  by_group = {group: of_group(entries, group) for group in groups(entries)}
  is_student = {group: group.role != "teacher" for group in by_group}
  seeds = [{e.seed for e in members} for group, members in by_group.items() if is_student[group]]
  common = set.intersection(*seeds) if seeds else set()
  return {
    group: min(members, key=lambda entry: (entry.seed not in common, entry.seed))
    for group, members in by_group.items()
  }


def spread(values: Sequence[float]) -> Spread | None:
  """Returns mean and sample standard deviation; None without values."""
  if not values:
    return None
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return Spread(float(np.mean(values)), deviation, len(values))


def _check_metrics(entries: Sequence[Entry], metrics: Sequence[Metric]) -> None:
  if not metrics:
    raise ValueError("task.metrics: expected at least one Metric, got none")
  for metric in metrics:
    try:
      format(0.5, metric.format)
    except ValueError as error:
      raise ValueError(f"task.metrics: {metric.name!r}: format: {error}") from error
  first = metrics[0].name
  if not any(first in entry.scores for entry in entries):
    names = sorted({name for entry in entries for name in entry.scores})
    raise ValueError(
      f"entries: expected the score {first!r} (task.metrics[0]) in at least one, got {names}"
    )
  costs = {name for entry in entries for name in entry.cost}
  clashes = [metric.name for metric in metrics if metric.name in costs]
  if clashes:
    raise ValueError(f"task.metrics: expected names that no cost has, got {clashes}: rename them")


def _check_entry(entry: Entry, rows: int | None) -> None:
  name = f"entry {entry.group.name!r} of seed {entry.seed}" if entry.role in ROLES else "entries"
  if entry.role not in ROLES:
    raise ValueError(f"{name}: role: got {entry.role!r}{suggest(entry.role, ROLES)}")
  variant = entry.variant
  if variant and entry.role != "student":
    raise ValueError(f"{name}: variant: expected none for this role, got {variant!r}")
  # matplotlib reads a dollar sign as the beginning of mathematics.
  valid = variant.isprintable() and variant == variant.strip() and "$" not in variant
  if len(variant) > MAX_VARIANT or not valid:
    raise ValueError(
      f"{name}: variant: expected at most {MAX_VARIANT} printable characters without '$', "
      f"got {variant!r}"
    )
  for key, array in (entry.predictions or {}).items():
    if rows is not None and len(array) != rows:
      raise ValueError(
        f"{name}: predictions[{key!r}]: expected {rows} rows as in references, got {len(array)}"
      )


def _num_rows(references: Mapping[str, Any]) -> int | None:
  """Returns the number of test examples; None where there are no references."""
  rows = {name: len(array) for name, array in references.items() if array is not None}
  if len(set(rows.values())) > 1:
    raise ValueError(f"references: expected arrays with one row per test example, got {rows} rows")
  return next(iter(rows.values()), None)
