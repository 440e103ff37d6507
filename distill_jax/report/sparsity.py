"""Shows how small and sparse students are: zeros by layer, and scores against costs."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from distill_jax.report.document import Table
from distill_jax.report.entries import BATCH, Entry, groups, one_per_group, over_seeds
from distill_jax.report.numbers import MISSING, axis_label, scale
from distill_jax.report.style import PAGE, columns_of, figure, legend, looks
from distill_jax.types import Metric

_COLUMNS = 3
_COSTS = (
  ("parameters", "parameters"),
  ("nonzeros", "nonzero parameters"),
  ("compressed", "bytes on disk, compressed"),
  ("flops", "FLOPs per example"),
  ("latency_ms", "latency of one example, ms"),
  (f"throughput_{BATCH}", f"examples/s at batch {BATCH}"),
)


def table(entries: Sequence[Entry]) -> Table | None:
  """Returns the nonzero values of each layer and its fraction of zeros; None without layers."""
  layers = {
    group: {layer.name: layer for layer in entry.layers}
    for group, entry in one_per_group(entries).items()
    if group.role != "teacher"
  }
  names = list(dict.fromkeys(name for by_name in layers.values() for name in by_name))
  if not names:
    return None
  rows = [[name, *(_cell(by_name.get(name)) for by_name in layers.values())] for name in names]
  return Table(["Layer", *(group.variant or group.title for group in layers)], rows)


def score_against_costs(
  entries: Sequence[Entry], metric: Metric, page: float = PAGE
) -> Figure | None:
  """Draws a panel per cost: means over seeds with the score's deviation; None without costs."""
  costs = [row for row in _COSTS if any(entry.values.get(row[0]) for entry in entries)]
  if not costs:
    return None
  columns = columns_of(_COLUMNS, page)
  lines = -(-len(costs) // columns)
  drawing = figure(page, 3.3 * lines + 0.4)
  panels = list(drawing.subplots(lines, columns, squeeze=False, sharey=True).flat)
  for axes, (name, title) in zip(panels, costs):
    _draw_cost(axes, entries, metric, name)
    _log_axis(axes, title)
  for axes in panels[len(costs) :]:
    axes.set_axis_off()
  for axes in panels[::columns]:
    axes.set_ylabel(f"test {axis_label(metric)}")
  _legend(drawing, entries)
  return drawing


def _draw_cost(axes: Axes, entries: Sequence[Entry], metric: Metric, name: str) -> None:
  factor = scale(metric)
  for number, (group, look) in enumerate(looks(groups(entries)).items(), 1):
    score = over_seeds(entries, group, metric.name)
    cost = over_seeds(entries, group, name)
    if score is None or cost is None or not cost.mean:
      continue
    point = (cost.mean, factor * score.mean)
    bar = None if score.deviation is None else factor * score.deviation
    axes.errorbar(*point, bar, **look.points, markersize=5, capsize=3, label=group.title)
    axes.annotate(str(number), point, (5, 4), textcoords="offset points", fontsize=8)


def _log_axis(axes: Axes, title: str) -> None:
  axes.set(xscale="log", xlabel=title)
  axes.margins(0.12)
  low, high = axes.get_xlim()
  if any(low <= tick <= high for tick in axes.get_xticks()):
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(drawing: Figure, entries: Sequence[Entry]) -> None:
  """Draws a legend whose numbers are those of the points."""
  handles: dict[str, Any] = {}
  for axes in drawing.axes:
    lines, titles = axes.get_legend_handles_labels()
    handles |= dict(zip(titles, lines))
  titles = [(f"{n} {group.title}", group.title) for n, group in enumerate(groups(entries), 1)]
  numbered = {label: handles[title] for label, title in titles if title in handles}
  legend(drawing, numbered)


def _cell(layer: Any) -> str:
  if layer is None:
    return MISSING
  fraction = layer.zeros / max(1, layer.parameters)
  return f"{layer.parameters - layer.zeros:,} · {100 * fraction:.0f} %"
