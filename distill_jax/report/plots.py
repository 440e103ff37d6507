"""Pictures of numbers: learning curves, confusion, calibration, accuracy against size."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from distill_jax import metrics
from distill_jax.report.headline import ACCURACY, Headline, headline
from distill_jax.report.results import Entry, Group, Measured, groups, over_seeds
from distill_jax.report.style import Look, class_labels, figure, looks

ANNOTATED = 20  # classes up to which a confusion matrix shows its counts


def learning_curves(entries: Sequence[Entry], main: Headline = ACCURACY) -> Figure | None:
  """Training loss and the headline score of the validation split against the step; None where no history holds either.

  Per group the mean over seeds and a band of one sample standard deviation, over the steps that every seed
  reached; between two logged steps the line is straight.
  """
  panels = (
    ("train", "loss", "Training loss"),
    ("validation", main.score, f"Validation {main.name}"),
  )
  picture = figure(10, 3.6)
  legend: dict[str, Line2D] = {}
  style = looks(groups(entries))
  for axes, (phase, key, title) in zip(picture.subplots(1, 2), panels):
    label, factor = main.axis if key == main.score else (key, 1)
    for order, (group, look) in enumerate(style.items()):
      curves = [_curve(entry.history, phase, key) for entry in entries if entry.group == group]
      curves = [(steps, values * factor) for steps, values in curves if len(steps)]
      if curves:
        # Dots over dashes over a full line: where curves agree, all are seen.
        legend[group.title] = _band(axes, look, 5 - order / len(style), *_common(curves))
    axes.set(title=title, xlabel="optimizer step", ylabel=label)
  picture.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=3)
  return picture if legend else None


def confusion(chosen: Mapping[Group, Measured], class_names: Sequence[str]) -> Figure:
  """One matrix per group: rows true classes, columns predictions; colored by the share of the row."""
  classes = len(class_names)
  columns = 2 if 12 < classes <= ANNOTATED else 3
  columns = min(columns, len(chosen))
  rows = -(-len(chosen) // columns)
  shown = range(0, classes, 1 if classes <= ANNOTATED else -(-classes // 10))
  labels = class_labels(class_names, 14)
  names = [labels[c] for c in shown]
  longest = max(map(len, names))
  room = 0.085 * longest  # inches that the names take
  side = min(5.0, (8.6 - room) / columns, 1.6 + 0.35 * classes)
  picture = figure(1.4 + room + columns * side, rows * (side + 0.7 + (room if longest > 2 else 0)))
  grid = picture.subplots(rows, columns, squeeze=False)
  for axes in grid.flat[len(chosen) :]:
    axes.set_axis_off()
  for axes, (group, measured) in zip(grid.flat, chosen.items()):
    image = _matrix(axes, np.asarray(measured.counts["confusion"]), side)
    axes.set(title=f"{group.title}, seed {measured.entry.seed}", xlabel="predicted class")
    axes.set_xticks(shown, names, rotation=90 if longest > 2 else 0, parse_math=False)
    axes.set_yticks(shown, names if axes in grid[:, 0] else [""] * len(names), parse_math=False)
  for axes in grid[:, 0]:
    axes.set_ylabel("true class")
  bar = picture.colorbar(
    image, ax=grid, shrink=0.7, aspect=25, pad=0.01, format=PercentFormatter(1)
  )
  bar.set_label("share of the true class")
  bar.outline.set_visible(False)
  return picture


def reliability(chosen: Mapping[Group, Measured]) -> Figure:
  """Accuracy of the predictions of each confidence, per group, over the share of such predictions."""
  style, columns = looks(list(chosen)), min(3, len(chosen))
  lines = -(-len(chosen) // columns)
  picture = figure(0.4 + 3.2 * columns, 4.2 * lines)
  for line, part in enumerate(picture.subfigures(lines, 1, squeeze=False)[:, 0]):
    shown = list(chosen.items())[line * columns : (line + 1) * columns]
    shape = {"height_ratios": [3.2, 1]}
    grid = part.subplots(2, columns, sharex=True, sharey="row", squeeze=False, gridspec_kw=shape)
    for axes in grid[:, len(shown) :].flat:
      axes.set_visible(False)
    for (top, bottom), (group, measured) in zip(grid.T, shown):
      _calibration(top, bottom, group, style[group], measured)
    grid[0, 0].set_ylabel("accuracy, %")
    grid[1, 0].set_ylabel("predictions, %")
    part.align_ylabels(grid[:, 0])
  return picture


def score_against_parameters(measured: Sequence[Measured]) -> Figure | None:
  """One small marker per seed and a large one for the mean; None where no cost holds the parameters."""
  known = [m for m in measured if m.scores.get("parameters")]
  if not known:
    return None
  sizes = [m.scores["parameters"] for m in known]
  low, high = min(sizes) / 2, max(sizes) * 2
  main = headline(measured)
  label, factor = main.axis
  picture = figure(6.5, 4)
  axes = picture.subplots()
  style = looks(groups(m.entry for m in known))
  beside = [group for group in style if group.role != "teacher"]
  for group, look in style.items():
    mean = over_seeds(known, group, main.score)
    if mean is None:
      continue
    # Students alone and distilled are equally large: they stand side by side, 2 % of the width apart.
    place = beside.index(group) - (len(beside) - 1) / 2 if group in beside else 0
    aside = (high / low) ** (0.02 * place)
    own = [m.scores for m in known if m.entry.group == group]
    size = sum(s["parameters"] for s in own) / len(own)
    points = [s["parameters"] * aside for s in own], [factor * s[main.score] for s in own]
    axes.plot(*points, **look.points, markersize=4, alpha=0.5)
    bar = None if mean.deviation is None else factor * mean.deviation
    named = f"{group.title}: {size:,.0f}"
    axes.errorbar(
      size * aside, factor * mean.mean, bar, label=named, **look.points, markersize=8, capsize=4
    )
  axes.set(xscale="log", xlim=(low, high), xlabel="parameters", ylabel=f"test {label}")
  axes.set_title(f"Test {main.name} against number of parameters")
  axes.margins(y=0.15)
  if main == ACCURACY:
    axes.set_ylim(top=min(101, axes.get_ylim()[1]))
  picture.legend(loc="outside lower center", ncols=3 if len(style) <= 3 else 2)
  return picture


def _curve(history, phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values; of a step logged twice (a run that was resumed) the last, of NaN and infinity none."""
  lines = [line for line in history if line.get("phase") == phase and line.get(key) is not None]
  points = {line["step"]: line[key] for line in lines if np.isfinite(line[key])}
  steps = sorted(points)
  return np.array(steps, float), np.array([points[step] for step in steps], float)


def _common(curves) -> tuple[np.ndarray, np.ndarray]:
  """All curves [seeds, steps] at the union of their steps, as far as every one goes."""
  first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
  steps = np.unique(np.concatenate([steps for steps, _ in curves]))
  steps = steps[(steps >= first) & (steps <= last)]
  return steps, np.stack([np.interp(steps, *curve) for curve in curves])


def _band(axes, look: Look, zorder: float, steps: np.ndarray, values: np.ndarray) -> Line2D:
  mean = values.mean(0)
  marker = look.marker if len(steps) == 1 else ""
  style = {"color": look.color, "linestyle": look.line, "marker": marker, "zorder": zorder}
  (line,) = axes.plot(steps, mean, linewidth=1.8, **style)
  if len(values) > 1:
    spread = values.std(0, ddof=1)
    axes.fill_between(
      steps, mean - spread, mean + spread, color=look.color, alpha=0.18, linewidth=0
    )
  return line


def _matrix(axes, counts: np.ndarray, side: float):
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  # The square root makes the few mistakes visible beside a full diagonal.
  image = axes.imshow(shares, cmap="Blues", interpolation="nearest", norm=PowerNorm(0.5, 0, 1))
  axes.grid(False)
  if len(counts) <= ANNOTATED:
    size = min(9, 72 * 0.78 * side / len(counts) / 2.6)
    for (row, column), count in np.ndenumerate(counts):
      if count:
        ink = "white" if shares[row, column] > 0.4 else "#1c1f23"
        axes.text(column, row, f"{count}", ha="center", va="center", color=ink, fontsize=size)
  return image


def _calibration(top, bottom, group: Group, look: Look, measured: Measured) -> None:
  bins = metrics.reliability(measured.counts)
  width = np.diff(bins["edges"])
  filled = bins["number"] > 0
  left, width, number = (
    100 * v for v in (bins["edges"][:-1], width, bins["number"] / bins["number"].sum())
  )
  confidence, accuracy = 100 * bins["confidence"][filled], 100 * bins["accuracy"][filled]
  bars = {
    "align": "edge",
    "color": look.color,
    "alpha": 0.5,
    "edgecolor": "white",
    "linewidth": 0.6,
  }
  top.bar(left[filled], accuracy, width[filled], **bars)
  top.plot([0, 100], [0, 100], color="#7a828c", linewidth=1)
  top.plot(confidence, accuracy, **look.points, markersize=4.5, clip_on=False)
  top.set(xlim=(0, 100), ylim=(0, 100))
  below = "\n" if group.variant else " "
  top.set_title(
    f"{group.title},{below}seed {measured.entry.seed}: ECE {100 * measured.scores['ece']:.2f} %"
  )
  bottom.bar(left, number, width, **bars)
  bottom.set(ylim=(0, 100), xlabel="confidence, %")
