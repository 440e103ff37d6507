"""Draws scores against the number that ends the names of students (top.1, top.4, top.16)."""

import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report.entries import Entry, Group, groups, over_seeds, students
from distill_jax.report.numbers import axis_label, scale
from distill_jax.report.style import PAGE, Look, columns_of, figure, legend, looks
from distill_jax.types import Metric

MIN_NUMBERS = 3  # numbers that make a curve
_CALIBRATION = "ece"  # the metric of the second panel, where the task has it
# A dot before the digits that follow other digits is a decimal point: 0.25 is one number.
_NAME = re.compile(r"(.*[^\d.])\.([1-9][0-9]{0,14})", re.ASCII)


def series(entries: Sequence[Entry]) -> dict[str, dict[int, Group]]:
  """Returns {name: {number: distilled student}} of names with at least three numbers."""
  by_name: dict[str, dict[int, Group]] = {}
  for group in students(entries):
    match = _NAME.fullmatch(group.variant)
    if match:
      by_name.setdefault(match[1], {})[int(match[2])] = group
  return {
    name: dict(sorted(numbers.items()))
    for name, numbers in by_name.items()
    if len(numbers) >= MIN_NUMBERS
  }


def panels(metrics: Sequence[Metric]) -> list[Metric]:
  """Returns the metrics that are drawn: the first one, and the task's calibration error."""
  return [metrics[0], *(metric for metric in metrics[1:] if metric.name == _CALIBRATION)]


def score_against_number(
  entries: Sequence[Entry], metrics: Sequence[Metric], page: float = PAGE
) -> Figure | None:
  """Draws a panel per metric of `panels`; None without a series.

  Networks without a number are level lines: the teacher, the baseline and the first such student.
  """
  curves = series(entries)
  if not curves:
    return None
  levels = _levels(entries)
  style = looks([*levels, *(next(iter(numbers.values())) for numbers in curves.values())])
  chosen = panels(metrics)
  columns = columns_of(len(chosen), page)
  lines = len(chosen) // columns
  drawing = figure(page if len(chosen) > 1 else min(page, 6.5), 3.4 * lines + 0.4)
  for axes, metric in zip(drawing.subplots(lines, columns, squeeze=False).flat, chosen):
    _draw_levels(axes, entries, metric, levels, style)
    _draw_curves(axes, entries, metric, curves, style)
    axes.set(ylabel=f"test {axis_label(metric)}")
  handles = {
    name: line for axes in drawing.axes for line, name in zip(*axes.get_legend_handles_labels())
  }
  legend(drawing, handles, 4)
  return drawing


def _draw_levels(
  axes: Axes,
  entries: Sequence[Entry],
  metric: Metric,
  levels: Sequence[Group],
  style: Mapping[Group, Look],
) -> None:
  for group in levels:
    spread = over_seeds(entries, group, metric.name)
    if spread is not None:
      look = style[group]
      height = scale(metric) * spread.mean
      label = group.variant or group.title
      axes.axhline(height, color=look.color, linestyle=look.line, label=label)


def _draw_curves(
  axes: Axes,
  entries: Sequence[Entry],
  metric: Metric,
  curves: Mapping[str, Mapping[int, Group]],
  style: Mapping[Group, Look],
) -> None:
  factor = scale(metric)
  for name, numbers in curves.items():
    look = style[next(iter(numbers.values()))]
    all_spreads = {n: over_seeds(entries, group, metric.name) for n, group in numbers.items()}
    spreads = {number: spread for number, spread in all_spreads.items() if spread is not None}
    means = [factor * spread.mean for spread in spreads.values()]
    bars = [factor * (spread.deviation or 0) for spread in spreads.values()]
    keywords = {"color": look.color, "marker": look.marker, "linestyle": look.line, "capsize": 3}
    axes.errorbar([*spreads], means, bars, label=name, **keywords)
  ticks = sorted({number for numbers in curves.values() for number in numbers})
  axes.set(xscale="log", xlabel=f"K of {' and '.join(f'{name}.K' for name in curves)}")
  axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
  axes.minorticks_off()


def _levels(entries: Sequence[Entry]) -> list[Group]:
  others = [group for group in groups(entries) if not _NAME.fullmatch(group.variant)]
  first = [group for group in others if group.role == "student"][:1]
  return [group for group in others if group.role != "student" or group in first]
