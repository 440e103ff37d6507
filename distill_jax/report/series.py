"""Students that differ in one number, which ends their names (top.1, top.4, top.16): what that number buys."""

import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from distill_jax.report.headline import headline
from distill_jax.report.results import Group, Measured, groups, over_seeds, students
from distill_jax.report.style import figure, looks

LEAST = 3  # numbers that make a curve
_NAME = re.compile(
  r"(.*[^\d.])\.([1-9][0-9]{0,14})", re.ASCII
)  # 0.25 at the end of a name is one number


def series(measured: Sequence[Measured]) -> dict[str, dict[int, Group]]:
  """The distilled students of each name, by their number; names with fewer than three are left out."""
  found: dict[str, dict[int, Group]] = {}
  for group in students(measured):
    named = _NAME.fullmatch(group.variant)
    if named:
      found.setdefault(named[1], {})[int(named[2])] = group
  return {name: dict(sorted(known.items())) for name, known in found.items() if len(known) >= LEAST}


def score_against_number(measured: Sequence[Measured]) -> Figure | None:
  """The headline score and the calibration error against the number; networks without one are level lines: the teacher,
  the student alone and the first distilled one without."""
  curves = series(measured)
  if not curves:
    return None
  main = headline(measured)
  label, factor = main.axis
  levels = _levels(measured)
  style = looks([*levels, *(next(iter(numbers.values())) for numbers in curves.values())])
  picture = figure(10, 3.8)
  panels = ((main.score, f"test {label}", factor), ("ece", "calibration error, %", 100))
  for axes, (score, name, scale) in zip(picture.subplots(1, 2), panels):
    _draw(axes, measured, score, scale, levels, curves, style)
    axes.set(ylabel=name)
  known = {
    name: line for axes in picture.axes for line, name in zip(*axes.get_legend_handles_labels())
  }
  picture.legend(list(known.values()), list(known), loc="outside lower center", ncols=4)
  return picture


def _draw(axes, measured, score, scale, levels, curves, style) -> None:
  for group in levels:
    mean, look = over_seeds(measured, group, score), style[group]
    if mean is not None:
      known_as = group.variant or group.title
      axes.axhline(scale * mean.mean, color=look.color, linestyle=look.line, label=known_as)
  for family, numbers in curves.items():
    look = style[next(iter(numbers.values()))]
    found = {number: over_seeds(measured, group, score) for number, group in numbers.items()}
    spreads = {number: spread for number, spread in found.items() if spread is not None}
    bars = [
      0 if spread.deviation is None else scale * spread.deviation for spread in spreads.values()
    ]
    means = [scale * spread.mean for spread in spreads.values()]
    keywords = {"color": look.color, "marker": look.marker, "linestyle": look.line, "capsize": 3}
    axes.errorbar([*spreads], means, bars, label=family, **keywords)
  ticks = sorted({number for numbers in curves.values() for number in numbers})
  axes.set(xscale="log", xlabel="number")
  axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
  axes.minorticks_off()


def _levels(measured: Sequence[Measured]) -> list[Group]:
  others = [
    group for group in groups(m.entry for m in measured) if not _NAME.fullmatch(group.variant)
  ]
  first = [group for group in others if group.role == "student"][:1]
  return [group for group in others if group.role != "student" or group in first]
