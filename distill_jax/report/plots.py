"""Draws learning curves, and the first metric against the number of parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distill_jax.objectives.terms import RESERVED
from distill_jax.report.entries import Entry, Group, groups, of_group, over_seeds
from distill_jax.report.numbers import axis_label, scale
from distill_jax.report.style import PAGE, Look, columns_of, figure, legend, limit_percent, looks
from distill_jax.types import Metric

Curve = tuple[np.ndarray, np.ndarray]  # steps and values
_COLUMNS = 3  # panels of a figure side by side, at most
_LEARNING_RATE = "learning_rate"


class _Panel(NamedTuple):
  """One value of the histories against the step; a positive loss has a logarithmic axis."""

  phase: str
  name: str
  title: str
  label: str
  factor: float = 1
  is_loss: bool = False


def learning_curves(entries: Sequence[Entry], metric: Metric, page: float = PAGE) -> Figure | None:
  """Draws training loss and validation score against the step; None where no history has either.

  Lines are means over seeds and bands one sample standard deviation, at the steps that every seed
  reached; between two logged steps a line is straight. The loss has a logarithmic axis where it is
  positive.
  """
  return _draw(
    entries,
    [
      _Panel("train", "loss", "Training loss", "loss", is_loss=True),
      _Panel(
        "validation",
        metric.name,
        f"Validation {metric.title}",
        axis_label(metric),
        scale(metric),
      ),
    ],
    page,
  )


def term_curves(
  entries: Sequence[Entry], metrics: Sequence[Metric], page: float = PAGE
) -> Figure | None:
  """Draws the validation loss, the unweighted terms of the objectives in training, and the learning
  rate, as `learning_curves` does; None where no history has any.

  Args:
    entries: the networks.
    metrics: of the task; the first one has a panel in `learning_curves`.
    page: width of the page in inches.
  """
  lines = [line for entry in entries for line in entry.history if line.get("phase") == "train"]
  names = list(dict.fromkeys(name for line in lines for name in line))
  # Of examples without labels the metrics are the terms.
  others = {*RESERVED, *(metric.name for metric in metrics if metric.better == "max")}
  rates = [name for name in names if name.partition("/")[0] == _LEARNING_RATE]
  terms = [name for name in names if name not in others and name not in rates]
  panels = []
  if metrics[0].name != "loss":
    panels.append(_Panel("validation", "loss", "Validation loss", "loss", is_loss=True))
  panels += [_Panel("train", name, f"Training: {name}", name, is_loss=True) for name in terms]
  panels += [_Panel("train", name, name.replace("_", " ").capitalize(), "rate") for name in rates]
  return _draw(entries, panels, page)


def _draw(entries: Sequence[Entry], panels: Sequence[_Panel], page: float) -> Figure | None:
  """Draws the panels that some history has, at most three side by side; None without any."""
  curves = [(panel, _curves(entries, panel.phase, panel.name)) for panel in panels]
  drawn = [(panel, by_group) for panel, by_group in curves if by_group]
  if not drawn:
    return None
  columns = columns_of(min(len(drawn), _COLUMNS), page)
  rows = -(-len(drawn) // columns)
  drawing = figure(page if len(drawn) > 1 else min(page, 6.5), 3.2 * rows + 0.4)
  style = looks(groups(entries))
  handles: dict[str, Line2D] = {}
  grid = list(drawing.subplots(rows, columns, squeeze=False).flat)
  for axes in grid[len(drawn) :]:
    axes.remove()
  for axes, (panel, by_group) in zip(grid, drawn):
    for order, (group, look) in enumerate(style.items()):
      if group in by_group:
        steps, values = _common(by_group[group])
        # Dots are above dashes and dashes above a full line: where curves agree, all are visible.
        zorder = 5 - order / len(style)
        handles[group.title] = _band(axes, look, zorder, steps, values * panel.factor)
    axes.set(title=panel.title, xlabel="optimizer step", ylabel=panel.label)
    if panel.is_loss and _are_positive(by_group):
      axes.set_yscale("log")
  titled = {group.title: handles[group.title] for group in style if group.title in handles}
  legend(drawing, titled)
  return drawing


def score_against_parameters(
  entries: Sequence[Entry], metric: Metric, page: float = PAGE
) -> Figure | None:
  """Draws a small marker per seed and a large one for their mean; None without sizes or scores."""
  sized = [e for e in entries if e.values.get("parameters") and metric.name in e.scores]
  if not sized:
    return None
  sizes = [entry.values["parameters"] for entry in sized]
  limits = min(sizes) / 2, max(sizes) * 2
  drawing = figure(min(page, 6.5), 4)
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
  lines, titles = axes.get_legend_handles_labels()
  legend(drawing, dict(zip(titles, lines)), 3 if len(style) <= 3 else 2)
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


def _curves(entries: Sequence[Entry], phase: str, key: str) -> dict[Group, list[Curve]]:
  """Returns the curves of all seeds of each group that has one."""
  curves = {
    group: [_curve(entry.history, phase, key) for entry in of_group(entries, group)]
    for group in groups(entries)
  }
  filled = {group: [one for one in some if len(one[0])] for group, some in curves.items()}
  return {group: some for group, some in filled.items() if some}


def _are_positive(by_group: Mapping[Group, Sequence[Curve]]) -> bool:
  return all((values > 0).all() for curves in by_group.values() for _, values in curves)


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
