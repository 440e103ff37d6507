"""The tables of a report and the sentences that say what they show."""

from collections.abc import Sequence
from typing import NamedTuple

from distill_jax.report.document import Table
from distill_jax.report.headline import ACCURACY, Headline, headline
from distill_jax.report.numbers import (
  MISSING,
  Show,
  difference,
  mean,
  nats,
  percent,
  si_prefix,
  signed,
  thousandths,
  whole,
)
from distill_jax.report.results import (
  BATCH,
  Group,
  Measured,
  Spread,
  gain,
  groups,
  over_seeds,
  shared_seeds,
  students,
)


class _Row(NamedTuple):
  score: str
  title: str
  show: Show
  varies: bool = True  # over seeds; what does not has neither spread nor difference


_QUALITY = (
  _Row("perplexity", "Test perplexity ↓", thousandths),
  _Row("accuracy", "Test accuracy, % ↑", percent),
  _Row("top5", "Top-5 accuracy, % ↑", percent),
  _Row("precision", "Macro precision, % ↑", percent),
  _Row("recall", "Macro recall, % ↑", percent),
  _Row("f1", "Macro F1, % ↑", percent),
  _Row("nll", "Negative log-likelihood, nats ↓", nats),
  _Row("ece", "Expected calibration error, % ↓", percent),
  _Row("agreement", "Agreement with the teacher, % ↑", percent),
  _Row("teacher_kl", "KL(teacher ‖ student), nats ↓", nats),
)
_COST = (
  _Row("parameters", "Parameters", whole, varies=False),
  _Row("nonzeros", "Parameters that are not zero", whole),
  _Row("bytes", "Size, bytes", si_prefix, varies=False),
  _Row("disk", "On disk, bytes", si_prefix, varies=False),
  _Row("compressed", "On disk, compressed, bytes", si_prefix),
  _Row("flops", "FLOPs per example", si_prefix, varies=False),
  _Row("latency_ms", "Latency of one example, ms", thousandths),
  _Row(f"throughput_{BATCH}", f"Throughput at batch {BATCH}, examples/s", whole),
)


def tables(measured: Sequence[Measured], classes: int) -> list[Table]:
  """Scores of each group, and beside them the paired difference and the ratio to the teacher.

  Several distilled students have their differences and ratios in a table of their own.
  """
  rows = [row for row in _QUALITY + _COST if _is_known(measured, row, classes)]
  left, right = _scores(measured, rows), _changes(measured, rows)
  if len(right.header) == 1:
    return [left]
  if len(students(measured)) > 1:
    return [left, Table(right.header, right.rows[1:])]
  both = [[*one, *other[1:]] for one, other in zip(left.rows, right.rows)]
  return [Table([*left.header, *right.header[1:]], both)]


def verdicts(measured: Sequence[Measured], examples: int) -> list[str]:
  """What distillation changed, and whether more than chance between seeds: some plain words per student."""
  known = groups(m.entry for m in measured)
  if not students(measured):
    return ["No student was distilled in this run."]
  if Group("baseline") not in known:
    return ["The student was not trained alone, so this run cannot say what distillation changed."]
  return [_verdict(measured, group, examples) for group in students(measured)]


def _verdict(measured: Sequence[Measured], group: Group, examples: int) -> str:
  name = f"the student distilled ({group.variant})" if group.variant else "the student distilled"
  main = headline(measured)
  change = gain(measured, group, main.score)
  if change is None:
    return f"{name[0].upper()}{name[1:]} and the student alone share no seed, so there is no paired difference."
  amount = f"{name} differs from the student alone by {_amount(main, change.mean)}"
  if main == ACCURACY:
    amount += f" (one of the {examples} test examples is {100 / examples:.2f} points)"
  if change.deviation is None:
    return (
      f"With one seed, {amount}. One seed has no spread: "
      "only more seeds can show whether this is more than chance."
    )
  start = (
    f"Over {change.number} seeds, {amount}, with a sample standard deviation of "
    f"{' '.join(filter(None, [main.show(change.deviation), main.unit]))} over the seeds. "
  )
  if abs(change.mean) <= change.deviation:
    return (
      start
      + "The difference is within its spread: this run does not show that distillation matters."
    )
  better = (change.mean > 0) == main.more
  left = _size(measured, group)
  if left is not None and abs(left - 1) > 0.01:
    return (
      f"{start}The difference is larger than its spread: this student, which has {100 * left:.0f} % of the numbers, is "
      f"{'better' if better else 'worse'}."
    )
  effect = "helped" if better else "harmed"
  return start + f"The difference is larger than its spread: distillation {effect} this student."


def _size(measured: Sequence[Measured], group: Group) -> float | None:
  """The student's numbers that are not zero, over those of the student alone."""
  own, alone = (over_seeds(measured, g, "nonzeros") for g in (group, Group("baseline")))
  return None if own is None or alone is None or not alone.mean else own.mean / alone.mean


def _amount(main: Headline, change: float) -> str:
  return f"{signed(main.show, change)} {f'{main.unit} of' if main.unit else 'in'} test {main.name}"


def _scores(measured: Sequence[Measured], rows: Sequence[_Row]) -> Table:
  shown = groups(m.entry for m in measured)
  seeds = ["Seeds", *(str(sum(m.entry.group == group for m in measured)) for group in shown)]
  cells = [
    [row.title, *(_cell(row, over_seeds(measured, group, row.score)) for group in shown)]
    for row in rows
  ]
  return Table(["", *(group.title for group in shown)], [seeds, *cells])


def _changes(measured: Sequence[Measured], rows: Sequence[_Row]) -> Table:
  compared = [group for group in students(measured) if shared_seeds(measured, group)]
  teachers = any(m.entry.role == "teacher" for m in measured)
  ratios = students(measured) if teachers else []
  header = [
    "",
    *(f"{_short(g)} − alone" for g in compared),
    *(f"{_short(g)} / teacher" for g in ratios),
  ]
  lines = [["Seeds", *[""] * (len(header) - 1)]]
  for row in rows:
    line = [row.title]
    for group in compared:
      line.append(
        difference(row.show, gain(measured, group, row.score)) if row in _QUALITY else MISSING
      )
    teacher = over_seeds(measured, Group("teacher"), row.score)
    line += [_ratio(over_seeds(measured, group, row.score), teacher) for group in ratios]
    lines.append(line)
  return Table(header, lines)


def _is_known(measured: Sequence[Measured], row: _Row, classes: int) -> bool:
  return any(row.score in m.scores for m in measured) and (row.score != "top5" or classes > 10)


def _short(group: Group) -> str:
  return group.variant or "Distilled"


def _cell(row: _Row, spread: Spread | None) -> str:
  if spread is not None and (not row.varies or (row in _COST and not spread.deviation)):
    return row.show(spread.mean)  # of equal networks it was measured once
  return mean(row.show, spread)


def _ratio(student: Spread | None, teacher: Spread | None) -> str:
  if student is None or teacher is None or not teacher.mean:
    return MISSING
  ratio = student.mean / teacher.mean
  return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:#.3g}"
