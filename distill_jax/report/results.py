"""The numbers of a report: scores of each trained network, their spread over seeds, paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import metrics
from distill_jax.errors import suggest

ROLES = {"teacher": "Teacher", "baseline": "Student alone", "student": "Student distilled"}


class Entry(NamedTuple):
  """One trained network.

  Attributes:
    role: 'teacher', 'baseline' (the student trained without the teacher) or 'student' (distilled).
    seed: of its training; baseline and student are compared seed by seed.
    logits: [N, C], of the test split.
    cost: 'parameters', 'bytes', 'flops', 'latency_ms', 'throughput' (`metrics.cost`); any may be missing.
    history: lines of metrics.jsonl: {'step', 'phase': 'train' | 'validation', 'loss', 'accuracy', ...};
      may be empty.
  """

  role: str
  seed: int
  logits: np.ndarray
  cost: Mapping[str, float]
  history: Sequence[Mapping[str, Any]]


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
    where = f"entry {entry.role!r} of seed {entry.seed}"
    if entry.role not in ROLES:
      raise ValueError(f"{where}: unknown role{suggest(entry.role, ROLES)}")
    if entry.logits.shape != (rows, classes):
      raise ValueError(
        f"{where}: logits {entry.logits.shape}, expected (labels, class_names) {rows, classes}"
      )
  if not (np.asarray(labels) >= 0).any():
    raise ValueError("labels holds no label >= 0: there is nothing to score")
  keys = [(entry.role, entry.seed) for entry in entries]
  for role, seed in keys:
    if keys.count((role, seed)) > 1:
      raise ValueError(f"entries holds role {role!r} of seed {seed} more than once")
  if len(ids) != rows or (images is not None and len(images) != rows):
    found = f"{len(ids)} ids and {'no' if images is None else len(images)} images"
    raise ValueError(f"expected one id and image per label: got {rows} labels, {found}")
  if images is not None and np.ndim(images) != 4:
    raise ValueError(f"images must be [N, H, W, C], got {np.shape(images)}")


def measure(entries: Sequence[Entry], labels) -> list[Measured]:
  """Scores of each entry, compared with the teacher of its seed, or else with the first teacher."""
  teachers = [entry for entry in entries if entry.role == "teacher"]
  measured = []
  for entry in entries:
    same_seed = [teacher for teacher in teachers if teacher.seed == entry.seed]
    teacher = (same_seed + teachers + [None])[0] if entry.role != "teacher" else None
    counts = metrics.counts(
      jnp.asarray(entry.logits),
      jnp.asarray(labels),
      teacher_logits=None if teacher is None else jnp.asarray(teacher.logits),
    )
    counts = jax.device_get(counts)
    measured.append(Measured(entry, metrics.summary(counts) | dict(entry.cost), counts))
  return measured


def over_seeds(measured: Sequence[Measured], role: str, score: str) -> Spread | None:
  """Mean and spread of one score over the seeds of a role; None where no entry has it."""
  return _spread([m.scores[score] for m in measured if m.entry.role == role and score in m.scores])


def gain(measured: Sequence[Measured], score: str) -> Spread | None:
  """Distilled minus alone, paired by seed; None where no seed has both."""
  pairs = shared_seeds(measured)
  by_key = {(m.entry.role, m.entry.seed): m.scores for m in measured}
  scores = [(by_key["student", seed], by_key["baseline", seed]) for seed in pairs]
  return _spread([a[score] - b[score] for a, b in scores if score in a and score in b])


def shared_seeds(measured: Sequence[Measured]) -> list[int]:
  """Seeds for which the student was trained both with and without the teacher."""
  seeds = {role: {m.entry.seed for m in measured if m.entry.role == role} for role in ROLES}
  return sorted(seeds["student"] & seeds["baseline"])


def examples(measured: Sequence[Measured]) -> dict[str, Measured]:
  """One entry per role, of the first seed that student and baseline share, or else of the role's first."""
  chosen = {}
  for role in ROLES:
    own = sorted((m for m in measured if m.entry.role == role), key=lambda m: m.entry.seed)
    shared = [m for m in own if m.entry.seed in shared_seeds(measured)[:1]]
    if own:
      chosen[role] = (shared + own)[0]
  return chosen


def as_json(measured: Sequence[Measured], run: Mapping[str, Any]) -> dict[str, Any]:
  """All numbers of the report as plain values; a number that is not finite becomes None."""
  names = sorted({name for m in measured for name in m.scores})
  spreads = {role: _known({name: over_seeds(measured, role, name) for name in names}) for role in ROLES}
  gains = _known({name: gain(measured, name) for name in names})
  rows = [{"role": m.entry.role, "seed": m.entry.seed, "scores": m.scores} for m in measured]
  return _plain({"run": run, "entries": rows, "over_seeds": spreads, "distilled_minus_alone": gains})


def _spread(values: Sequence[float]) -> Spread | None:
  if not values:
    return None
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return Spread(float(np.mean(values)), deviation, len(values))


def _known(values: Mapping[str, Spread | None]) -> dict[str, Spread]:
  return {name: value for name, value in values.items() if value is not None}


def _plain(value):
  """What JSON can hold: NaN and infinity are not JSON, unknown objects become their text."""
  match value:
    case Spread():
      return _plain(value._asdict())
    case Mapping():
      return {str(key): _plain(item) for key, item in value.items()}
    case np.generic():
      return _plain(value.item())
    case bool() | int() | str() | None:
      return value
    case float():
      return value if math.isfinite(value) else None
    case list() | tuple() | np.ndarray():
      return [_plain(item) for item in value]
  return str(value)
