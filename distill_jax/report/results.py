"""The numbers of a report: scores of each trained network, their spread over seeds, paired differences."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import metrics
from distill_jax.errors import suggest

ROLES = {"teacher": "Teacher", "baseline": "Student alone", "student": "Student distilled"}
BATCH = 128  # examples at once, where the speed of a network is measured
VARIANT = 24  # characters of a variant's name at most: it stands in headers and legends


class Group(NamedTuple):
  """Networks that differ in their seed alone."""

  role: str
  variant: str = ""

  @property
  def title(self) -> str:
    return f"Distilled: {self.variant}" if self.variant else ROLES[self.role]

  @property
  def name(self) -> str:
    return f"{self.role}: {self.variant}" if self.variant else self.role


class Entry(NamedTuple):
  """One trained network.

  Attributes:
    role: 'teacher', 'baseline' (the student trained without the teacher) or 'student' (distilled).
    seed: of its training; baseline and student are compared seed by seed.
    logits: [N, C], of the test split; None of a language model, which has `counts`.
    cost: 'parameters', 'bytes', 'flops', 'latency_ms', 'throughput_128' (`metrics.cost`), 'nonzeros', 'disk' and
      'compressed' (`compression.sizes`), and 'step_ratio', the time of a train step over that of the run's reference;
      any may be missing.
    history: lines of metrics.jsonl: {'step', 'phase': 'train' | 'validation', 'loss', 'accuracy', ...};
      may be empty.
    variant: tells several distilled students of one seed apart ('generation 1'); of a 'student' only. They are
      shown in the order in which they first come; where there is room for one, it is the last.
    counts: of a language model, `metrics.token_scores` of the test split.
    layers: zeros of each array (`compression.sizes.layer_zeros`); may be empty.
    text: what the report prints of the network, such as text that it wrote; may be empty.
  """

  role: str
  seed: int
  logits: np.ndarray | None
  cost: Mapping[str, float]
  history: Sequence[Mapping[str, Any]]
  variant: str = ""
  counts: Mapping[str, Any] | None = None
  text: str = ""
  layers: Sequence[Any] = ()

  @property
  def group(self) -> Group:
    return Group(self.role, self.variant)


class Measured(NamedTuple):
  """An entry with its `scores` (`metrics.summary` and the cost) and the `counts` that they come from."""

  entry: Entry
  scores: dict[str, float]
  counts: dict[str, Any]


class Spread(NamedTuple):
  """Mean over `number` seeds, and their sample standard deviation: None where one seed has none."""

  mean: float
  deviation: float | None
  number: int


def check(entries: Sequence[Entry], labels, images, ids, class_names) -> None:
  """Raise a ValueError that names the first argument which does not fit the others."""
  rows, classes = len(labels), len(class_names)
  if not entries:
    raise ValueError("entries is empty: a report needs at least one trained network")
  for entry in entries:
    where = f"entry {entry.group.name!r} of seed {entry.seed}"
    if entry.role not in ROLES:
      raise ValueError(f"{where}: unknown role{suggest(entry.role, ROLES)}")
    _check_variant(entry, where)
    shape = None if entry.logits is None else entry.logits.shape
    if entry.counts is None and shape != (rows, classes):
      raise ValueError(f"{where}: logits {shape}, expected (labels, class_names) {rows, classes}")
  if any(entry.counts is None for entry in entries) and not (np.asarray(labels) >= 0).any():
    raise ValueError("labels holds no label >= 0: there is nothing to score")
  keys = Counter((entry.group, entry.seed) for entry in entries)
  for (group, seed), number in keys.items():
    if number > 1:
      raise ValueError(f"entries holds role {group.name!r} of seed {seed} more than once")
  if len(ids) != rows or (images is not None and len(images) != rows):
    found = f"{len(ids)} ids and {'no' if images is None else len(images)} images"
    raise ValueError(f"expected one id and image per label: got {rows} labels, {found}")
  if images is not None and np.ndim(images) != 4:
    raise ValueError(f"images must be [N, H, W, C], got {np.shape(images)}")


def _check_variant(entry: Entry, where: str) -> None:
  name = entry.variant
  if name and entry.role != "student":
    raise ValueError(f"{where}: only a distilled student has a variant, got {name!r}")
  # A dollar sign would be read as mathematics by matplotlib.
  if len(name) > VARIANT or not name.isprintable() or name != name.strip() or "$" in name:
    raise ValueError(
      f"{where}: a variant is at most {VARIANT} printable characters without '$', got {name!r}"
    )


def measure(entries: Sequence[Entry], labels) -> list[Measured]:
  """Scores of each entry, compared with the teacher of its seed, or else with the first teacher."""
  teachers = [entry for entry in entries if entry.role == "teacher"]
  measured = []
  for entry in entries:
    same_seed = [teacher for teacher in teachers if teacher.seed == entry.seed]
    teacher = (same_seed + teachers + [None])[0] if entry.role != "teacher" else None
    counts = entry.counts
    if counts is None:
      counts = metrics.counts(
        jnp.asarray(entry.logits),
        jnp.asarray(labels),
        teacher_logits=None if teacher is None else jnp.asarray(teacher.logits),
      )
    counts = jax.device_get(dict(counts))
    measured.append(Measured(entry, metrics.summary(counts) | dict(entry.cost), counts))
  return measured


def groups(entries: Iterable[Entry]) -> list[Group]:
  """The groups of the entries: by role, and those of one role in the order in which they first come."""
  return sorted(
    dict.fromkeys(entry.group for entry in entries), key=lambda group: list(ROLES).index(group.role)
  )


def students(measured: Sequence[Measured]) -> list[Group]:
  """The groups of distilled students."""
  return [group for group in groups(m.entry for m in measured) if group.role == "student"]


def over_seeds(measured: Sequence[Measured], group: Group, score: str) -> Spread | None:
  """Mean and spread of one score over the seeds of a group; None where no entry has it."""
  return spread([m.scores[score] for m in measured if m.entry.group == group and score in m.scores])


def gain(measured: Sequence[Measured], group: Group, score: str) -> Spread | None:
  """Distilled minus alone, paired by seed; None where no seed has both."""
  scores = [(student.scores, alone.scores) for student, alone in pairs(measured, group)]
  return spread([a[score] - b[score] for a, b in scores if score in a and score in b])


def pairs(measured: Sequence[Measured], group: Group) -> list[tuple[Measured, Measured]]:
  """The distilled student of a group with the student alone of the same seed, for each seed that has both."""
  by_key = {(m.entry.group, m.entry.seed): m for m in measured}
  return [(by_key[group, s], by_key[Group("baseline"), s]) for s in shared_seeds(measured, group)]


def shared_seeds(measured: Sequence[Measured], group: Group) -> list[int]:
  """Seeds for which the student was trained both with and without the teacher."""
  distilled, alone = (
    {m.entry.seed for m in measured if m.entry.group == g} for g in (group, Group("baseline"))
  )
  return sorted(distilled & alone)


def examples(measured: Sequence[Measured]) -> dict[Group, Measured]:
  """One entry per group, of the first seed that all students share, or else of the group's first."""
  own = {
    group: [m for m in measured if m.entry.group == group]
    for group in groups(m.entry for m in measured)
  }
  seeds = [{m.entry.seed for m in found} for group, found in own.items() if group.role != "teacher"]
  common = set.intersection(*seeds) if seeds else set()
  return {
    group: min(found, key=lambda m: (m.entry.seed not in common, m.entry.seed))
    for group, found in own.items()
  }


def spread(values: Sequence[float]) -> Spread | None:
  """Mean and sample standard deviation; None of nothing."""
  if not values:
    return None
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return Spread(float(np.mean(values)), deviation, len(values))
