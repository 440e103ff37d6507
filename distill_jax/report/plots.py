"""Draws learning curves, and the first metric against the number of parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_jax.report.entries import Entry, Group, groups, of_group, over_seeds
from distill_jax.report.numbers import axis_label, scale
from distill_jax.report.style import Look, figure, limit_percent, looks
from distill_jax.types import Metric

Curve = tuple[np.ndarray, np.ndarray]  # steps and values


def learning_curves(entries: Sequence[Entry], metric: Metric) -> Figure | None:
  """Draws training loss and validation score against the step; None where no history has either.

  Lines are means over seeds and bands one sample standard deviation, at the steps that every seed
  reached; between two logged steps a line is straight.
  """
  panels = (
    ("train", "loss", "Training loss", "loss", 1),
    (
      "validation",
      metric.name,
      f"Validation {metric.title}",
      axis_label(metric),
      scale(metric),
    ),
  )
  drawing = figure(10, 3.6)
  legend: dict[str, Line2D] = {}
  style = looks(groups(entries))
  for axes, (phase, key, title, label, factor) in zip(drawing.subplots(1, 2), panels):
    for order, (group, look) in enumerate(style.items()):
      curves = [_curve(entry.history, phase, key) for entry in of_group(entries, group)]
      curves = [(steps, values * factor) for steps, values in curves if len(steps)]
      if curves:
        # Dots are above dashes and dashes above a full line: where curves agree, all are visible.
        legend[group.title] = _band(axes, look, 5 - order / len(style), *_common(curves))
    axes.set(title=title, xlabel="optimizer step", ylabel=label)
  drawing.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=3)
  return drawing if legend else None


def score_against_parameters(entries: Sequence[Entry], metric: Metric) -> Figure | None:
  """Draws a small marker per seed and a large one for their mean; None without sizes or scores."""
  sized = [e for e in entries if e.values.get("parameters") and metric.name in e.scores]
  if not sized:
    return None
  sizes = [entry.values["parameters"] for entry in sized]
  limits = min(sizes) / 2, max(sizes) * 2
  drawing = figure(6.5, 4)
  axes = drawing.subplots()
  style = looks(groups(sized))
  offsets = _offsets(style)
  for group, look in style.items():
    # Baseline and distilled students are equally large: 2 % of the width separates them.
    shift = (limits[1] / limits[0]) ** (0.02 * offsets.get(group, 0))
    _sized_group(axes, sized, group, metric, look, shift)
  axes.set(xscale="log", xlim=limits, xlabel="parameters", ylabel=f"test {axis_label(metric)}")
  axes.set_title(f"Test {metric.title} against number of parameters")
  axes.margins(y=0.15)
  limit_percent(axes, metric, max(entry.scores[metric.name] for entry in sized))
  drawing.legend(loc="outside lower center", ncols=3 if len(style) <= 3 else 2)
  return drawing


def _offsets(style: Iterable[Group]) -> dict[Group, float]:
  """Returns the position of each student in their row, counted from its center."""
  row = [group for group in style if group.role != "teacher"]
  return {group: index - (len(row) - 1) / 2 for index, group in enumerate(row)}


def _sized_group(
  axes: Axes, entries: Sequence[Entry], group: Group, metric: Metric, look: Look, shift: float
) -> None:
  mean = over_seeds(entries, group, metric.name)
  if mean is None:
    return
  factor = scale(metric)
  values = [entry.values for entry in of_group(entries, group)]
  sizes = [by_name["parameters"] for by_name in values]
  size = sum(sizes) / len(sizes)
  scores = [factor * by_name[metric.name] for by_name in values]
  axes.plot([n * shift for n in sizes], scores, **look.points, markersize=4, alpha=0.5)
  bar = None if mean.deviation is None else factor * mean.deviation
  label = f"{group.title}: {size:,.0f}"
  axes.errorbar(
    size * shift, factor * mean.mean, bar, label=label, **look.points, markersize=8, capsize=4
  )


def _curve(history: Sequence[Mapping[str, Any]], phase: str, key: str) -> Curve:
  """Returns the finite values of a history; of a step that was logged twice the last."""
  lines = [line for line in history if line.get("phase") == phase and line.get(key) is not None]
  points = {line["step"]: line[key] for line in lines if np.isfinite(line[key])}
  steps = sorted(points)
  return np.array(steps, float), np.array([points[step] for step in steps], float)


def _common(curves: Sequence[Curve]) -> Curve:
  """Returns all curves [seeds, steps] at the union of their steps, in the range they share."""
  first = max(steps[0] for steps, _ in curves)
  last = min(steps[-1] for steps, _ in curves)
  steps = np.unique(np.concatenate([steps for steps, _ in curves]))
  steps = steps[(steps >= first) & (steps <= last)]
  return steps, np.stack([np.interp(steps, *curve) for curve in curves])


def _band(axes: Axes, look: Look, zorder: float, steps: np.ndarray, values: np.ndarray) -> Line2D:
  mean = values.mean(0)
  marker = look.marker if len(steps) == 1 else ""
  style: dict[str, Any] = {"color": look.color, "linestyle": look.line, "marker": marker}
  (line,) = axes.plot(steps, mean, linewidth=1.8, zorder=zorder, **style)
  if len(values) > 1:
    deviation = values.std(0, ddof=1)
    low, high = mean - deviation, mean + deviation
    axes.fill_between(steps, low, high, color=look.color, alpha=0.18, linewidth=0)
  return line
