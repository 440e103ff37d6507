"""The table of a report and the sentence that says what it shows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from distill_jax.report.document import Table
from distill_jax.report.results import ROLES, Measured, Spread, gain, over_seeds


class _Row(NamedTuple):
  score: str
  title: str
  show: Callable[[float], str]
  varies: bool = True  # over seeds; what does not has neither spread nor difference


def _percent(value: float) -> str:
  return f"{100 * value:.2f}"


def _nats(value: float) -> str:
  return f"{value:.4f}"


def _whole(value: float) -> str:
  return f"{value:,.0f}"


def _thousandths(value: float) -> str:
  return f"{value:.3f}"


def _prefixed(value: float) -> str:
  for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.3g} {prefix}"
  return f"{value:.3g} "


_QUALITY = (
  _Row("accuracy", "Test accuracy, % ↑", _percent),
  _Row("top5", "Top-5 accuracy, % ↑", _percent),
  _Row("precision", "Macro precision, % ↑", _percent),
  _Row("recall", "Macro recall, % ↑", _percent),
  _Row("f1", "Macro F1, % ↑", _percent),
  _Row("nll", "Negative log-likelihood, nats ↓", _nats),
  _Row("ece", "Expected calibration error, % ↓", _percent),
  _Row("agreement", "Agreement with the teacher, % ↑", _percent),
  _Row("teacher_kl", "KL(teacher ‖ student), nats ↓", _nats),
)
_COST = (
  _Row("parameters", "Parameters", _whole, varies=False),
  _Row("bytes", "Size, bytes", _prefixed, varies=False),
  _Row("flops", "FLOPs per example", _prefixed, varies=False),
  _Row("latency_ms", "Latency of one example, ms", _thousandths),
  _Row("throughput", "Throughput, examples/s", _whole),
)


def table(measured: Sequence[Measured], classes: int) -> Table:
  """Scores of each role that was trained, the paired difference, and the ratio to the teacher."""
  roles = [role for role in ROLES if any(m.entry.role == role for m in measured)]
  compared = gain(measured, "accuracy") is not None
  ratio = {"teacher", "student"} <= set(roles)
  header = ["", *(ROLES[role] for role in roles)]
  header += ["Distilled − alone"] * compared + ["Distilled / teacher"] * ratio
  rows = [["Seeds", *(_seeds(measured, role) for role in roles), *[""] * (compared + ratio)]]
  for row in _QUALITY + _COST:
    spreads = {role: over_seeds(measured, role, row.score) for role in roles}
    if not any(spreads.values()) or (row.score == "top5" and classes <= 10):
      continue
    cells = [row.title, *(_cell(row, spread) for spread in spreads.values())]
    cells += [_difference(row, gain(measured, row.score))] * compared
    cells += [_ratio(spreads["student"], spreads["teacher"])] if ratio else []
    rows.append(cells)
  return Table(header, rows)


def verdict(measured: Sequence[Measured], examples: int) -> str:
  """What distillation changed, and whether more than chance between seeds: one plain sentence or two."""
  roles = {m.entry.role for m in measured}
  if "student" not in roles:
    return "No student was distilled in this run."
  if "baseline" not in roles:
    return "The student was not trained alone, so this run cannot say what distillation changed."
  change = gain(measured, "accuracy")
  if change is None:
    return "Student distilled and student alone share no seed, so there is no paired difference."
  amount = (
    f"by {_signed(_percent, change.mean)} points of test accuracy (one of the {examples} test examples is "
    f"{100 / examples:.2f} points)"
  )
  if change.deviation is None:
    return (
      f"With one seed, the student distilled differs from the student alone {amount}. One seed has no spread: "
      "only more seeds can show whether this is more than chance."
    )
  start = (
    f"Over {change.number} seeds, the student distilled differs from the student alone {amount}, with a sample "
    f"standard deviation of {_percent(change.deviation)} points over the seeds. "
  )
  if abs(change.mean) <= change.deviation:
    return start + "The difference is within its spread: this run does not show that distillation matters."
  effect = "helped" if change.mean > 0 else "harmed"
  return start + f"The difference is larger than its spread: distillation {effect} this student."


def _seeds(measured: Sequence[Measured], role: str) -> str:
  return str(sum(m.entry.role == role for m in measured))


def _cell(row: _Row, spread: Spread | None) -> str:
  if spread is None:
    return "–"
  if spread.deviation is None or not row.varies:
    return row.show(spread.mean)
  return f"{row.show(spread.mean)} ± {row.show(spread.deviation)}"


def _difference(row: _Row, change: Spread | None) -> str:
  if change is None or row not in _QUALITY:
    return "–"
  shown = _signed(row.show, change.mean)
  return shown if change.deviation is None else f"{shown} ± {row.show(change.deviation)}"


def _signed(show: Callable[[float], str], value: float) -> str:
  return ("+" if value >= 0 else "−") + show(abs(value))


def _ratio(student: Spread | None, teacher: Spread | None) -> str:
  if student is None or teacher is None or not teacher.mean:
    return "–"
  ratio = student.mean / teacher.mean
  return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:#.3g}"
