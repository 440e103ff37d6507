"""Runs that distill many students: a row for each, in words and pictures only the first."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.report.document import Table
from distill_jax.report.headline import PERPLEXITY, headline
from distill_jax.report.numbers import (
  MISSING,
  Show,
  difference,
  mean,
  nats,
  percent,
  si_prefix,
  thousandths,
  whole,
)
from distill_jax.report.results import BATCH, Group, Measured, gain, groups, over_seeds, students
from distill_jax.report.style import STUDENTS

_SCORES: Sequence[tuple[str, str, Show]] = (
  ("accuracy", "Test accuracy, % ↑", percent),
  ("nll", "NLL, nats ↓", nats),
  ("ece", "ECE, % ↓", percent),
  ("agreement", "Agreement with the teacher, % ↑", percent),
  ("teacher_kl", "KL(teacher ‖ student), nats ↓", nats),
)
_COSTS: Sequence[tuple[str, str, Show]] = (
  ("parameters", "Parameters ↓", whole),
  ("nonzeros", "Not zero ↓", whole),
  ("compressed", "On disk, compressed, bytes ↓", si_prefix),
  ("flops", "FLOPs ↓", si_prefix),
  ("latency_ms", "Latency, ms ↓", thousandths),
  (f"throughput_{BATCH}", f"Examples/s at batch {BATCH} ↑", whole),
)
_TIMES = ("latency_ms", f"throughput_{BATCH}")


def in_rows(measured: Sequence[Measured]) -> bool:
  """Whether a run's students stand in rows: those whose steps were timed, that differ in size, or that are more than
  pictures can tell apart."""
  return _is_timed(measured) or differ_in_size(measured) or len(students(measured)) > STUDENTS


def table(
  measured: Sequence[Measured],
  run: Mapping[str, Any],
  *,
  brief: bool = False,
  costs: bool | None = None,
) -> Table:
  """A row per group: the headline score, its paired difference to the student alone, further scores (`brief`: of a
  language model the calibration alone), what it costs (`costs`: whether; None: where students differ in size; `brief`:
  without times), and the time of a train step over that of the run's reference, where it was measured."""
  main = headline(measured)
  further = [
    row for row in _SCORES if row[0] != main.score and any(row[0] in m.scores for m in measured)
  ]
  scores = [row for row in further if not brief or (main == PERPLEXITY and row[0] == "ece")]
  priced = _COSTS if (differ_in_size(measured) if costs is None else costs) else ()
  if brief:  # runs of one table were timed at other times, beside other programs
    priced = [row for row in priced if row[0] not in _TIMES]
  header = [
    "Method",
    f"{main.title} {main.arrow}",
    "− alone",
    *(title for _, title, _ in (*scores, *priced)),
  ]
  timed = _is_timed(measured)
  if timed:
    header.append(f"Step time / {run.get('settings', {}).get('reference') or 'reference'} ↓")
  rows = []
  for group in groups(m.entry for m in measured):
    change = gain(measured, group, main.score) if group.role == "student" else None
    row = [group.variant or group.title, mean(main.show, over_seeds(measured, group, main.score))]
    row.append(difference(main.show, change) if group.role == "student" else "")
    row += [mean(show, over_seeds(measured, group, score)) for score, _, show in scores]
    found = [(over_seeds(measured, group, cost), show) for cost, _, show in priced]
    row += [MISSING if spread is None else show(spread.mean) for spread, show in found]
    rows.append([*row, _step_ratio(measured, group)] if timed else row)
  return Table(header, rows)


def differ_in_size(measured: Sequence[Measured]) -> bool:
  """Whether some students are smaller than others, or sparser by more than the zeros that chance makes."""
  sizes = [
    m.scores["nonzeros"] for m in measured if m.entry.role != "teacher" and "nonzeros" in m.scores
  ]
  return bool(sizes) and min(sizes) < 0.99 * max(sizes)


def about_time(measured: Sequence[Measured]) -> str:
  """What the times of the table are; nothing where it has none."""
  if not _is_timed(measured):
    return ""
  return "Step time: medians of one train step's time, both sides by turns in one process."


def few(measured: Sequence[Measured]) -> list[Measured]:
  """The teacher, the student alone, and as many distilled students as pictures can tell apart."""
  shown = students(measured)[:STUDENTS]
  return [m for m in measured if m.entry.role != "student" or m.entry.group in shown]


def verdict(measured: Sequence[Measured]) -> str:
  """How many students distillation helped and harmed, beyond the spread over seeds."""
  main = headline(measured)
  changes = [gain(measured, group, main.score) for group in students(measured)]
  known = [
    (c.mean if main.more else -c.mean, c.deviation)
    for c in changes
    if c is not None and c.deviation is not None
  ]
  if len(known) < len(changes):
    return (
      f"{len(changes)} students were distilled; not all share two seeds with the student alone."
    )
  better = sum(change > deviation for change, deviation in known)
  worse = sum(-change > deviation for change, deviation in known)
  return (
    f"Of {len(known)} distilled students {better} are better and {worse} worse than the student alone by more than "
    f"the sample standard deviation of the paired difference; for {len(known) - better - worse} it is within it."
  )


def left_out(measured: Sequence[Measured]) -> str:
  """Which students the words and pictures below the table are about."""
  known = students(measured)
  return (
    f"Words and pictures below are about the first {STUDENTS} of {len(known)} distilled students: "
    f"{', '.join(group.variant for group in known[:STUDENTS])}."
  )


def _is_timed(measured: Sequence[Measured]) -> bool:
  return any("step_ratio" in m.scores for m in measured)


def _step_ratio(measured: Sequence[Measured], group: Group) -> str:
  ratio = over_seeds(measured, group, "step_ratio")
  return MISSING if ratio is None else f"{ratio.mean:.2f}"
