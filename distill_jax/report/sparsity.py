"""How small the students of a run are: zeros layer by layer, and the score against what each network costs."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from distill_jax.report.document import Table
from distill_jax.report.headline import headline
from distill_jax.report.numbers import MISSING
from distill_jax.report.results import BATCH, Measured, examples, groups, over_seeds
from distill_jax.report.style import figure, looks

_COSTS = (
  ("parameters", "parameters"),
  ("nonzeros", "parameters that are not zero"),
  ("compressed", "bytes on disk, compressed"),
  ("flops", "FLOPs per example"),
  ("latency_ms", "latency of one example, ms"),
  (f"throughput_{BATCH}", f"examples/s at batch {BATCH}"),
)


def table(measured: Sequence[Measured]) -> Table | None:
  """Of each layer the numbers that are not zero and the share that is; None where nothing was measured."""
  shown = {
    group: m.entry.layers for group, m in examples(measured).items() if m.entry.role != "teacher"
  }
  names = list(dict.fromkeys(layer.name for layers in shown.values() for layer in layers))
  if not names:
    return None
  found = {group: {layer.name: layer for layer in layers} for group, layers in shown.items()}
  rows = [[name, *(_cell(own.get(name)) for own in found.values())] for name in names]
  return Table(["Layer", *(group.variant or group.title for group in shown)], rows)


def score_against_costs(measured: Sequence[Measured]) -> Figure | None:
  """A panel per cost: means over seeds, with one sample standard deviation of the score; None without costs."""
  known = [(key, title) for key, title in _COSTS if any(m.scores.get(key) for m in measured)]
  if not known:
    return None
  main, style = headline(measured), looks(groups(m.entry for m in measured))
  label, factor = main.axis
  picture = figure(10, 3.3 * -(-len(known) // 3) + 0.4)
  grid = picture.subplots(-(-len(known) // 3), 3, squeeze=False, sharey=True).flat
  for axes, (key, title) in zip(grid, known):
    for number, (group, look) in enumerate(style.items(), 1):
      score, cost = (over_seeds(measured, group, name) for name in (main.score, key))
      if score is None or cost is None or not cost.mean:
        continue
      bar = None if score.deviation is None else factor * score.deviation
      axes.errorbar(
        cost.mean,
        factor * score.mean,
        bar,
        **look.points,
        markersize=5,
        capsize=3,
        label=group.title,
      )
      axes.annotate(
        str(number),
        (cost.mean, factor * score.mean),
        (5, 4),
        textcoords="offset points",
        fontsize=8,
      )
    axes.set(xscale="log", xlabel=title)
    axes.margins(0.12)
    low, high = axes.get_xlim()
    if any(low <= tick <= high for tick in axes.get_xticks()):
      axes.xaxis.set_minor_formatter(NullFormatter())
  for axes in list(grid)[len(known) :]:
    axes.set_axis_off()
  for axes in picture.axes[::3]:
    axes.set_ylabel(f"test {label}")
  handles, names = picture.axes[0].get_legend_handles_labels()
  numbered = [
    f"{number} {group.title}" for number, group in enumerate(style, 1) if group.title in names
  ]
  picture.legend(handles, numbered, loc="outside lower center", ncols=3)
  return picture


def _cell(layer) -> str:
  return (
    MISSING if layer is None else f"{layer.parameters - layer.zeros:,} · {100 * layer.share:.0f} %"
  )
