"""Draws reliability diagrams."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report import style
from distill_jax.report.document import Block, Heading
from distill_jax.report.entries import Entry, Group, one_per_group
from distill_jax.report.variants import few
from distill_jax.tasks.logits import calibration_error

_CAPTION = (
  "Bars: accuracy of the predictions of each confidence; markers are at their mean confidence. On "
  "the diagonal confidence equals accuracy; markers below it are overconfident. ECE, the expected "
  "calibration error, is their mean distance from it, weighted with the number of predictions, "
  "which stands below."
)


def calibration_figures(entries: Sequence[Entry]) -> list[Block]:
  """Returns one reliability diagram per group; nothing where no entry has 'calibration'.

  Args:
    entries: networks whose `statistics` have 'calibration' [bins, 3] (examples, sum of their
      confidence, number correct).
  """
  counted = [entry for entry in few(entries) if "calibration" in (entry.statistics or {})]
  if not counted:
    return []
  draw_page = functools.partial(draw, one_per_group(counted))
  title = "Reliability diagrams"
  return [Heading("Calibration"), *style.pictures("reliability", title, _CAPTION, draw_page)]


def reliability(statistics: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns a reliability diagram (Guo et al. 2017, figure 1).

  Args:
    statistics: 'calibration' [bins, 3].

  Returns:
    'edges' [bins + 1] of the confidence, and for each bin (above its lower edge, up to its upper
    one) the 'number' of examples, their mean 'confidence' and their 'accuracy'; both are 0 in an
    empty bin.
  """
  number, confidence, correct = np.asarray(statistics["calibration"], np.float64).T
  divisor = np.maximum(number, 1)
  return {
    "edges": np.linspace(0, 1, len(number) + 1),
    "number": number,
    "confidence": confidence / divisor,
    "accuracy": correct / divisor,
  }


def draw(entries: Mapping[Group, Entry], page: float = style.PAGE) -> Figure:
  """Draws the accuracy of the predictions of each confidence, above the fraction of predictions."""
  looks = style.looks(list(entries))
  columns = style.columns_of(min(3, len(entries)), page)
  lines = -(-len(entries) // columns)
  drawing = style.figure(0.4 + 3.2 * columns, 4.2 * lines)
  for line, part in enumerate(drawing.subfigures(lines, 1, squeeze=False)[:, 0]):
    members = list(entries.items())[line * columns : (line + 1) * columns]
    heights = {"height_ratios": [3.2, 1]}
    grid = part.subplots(2, columns, sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    for axes in grid[:, len(members) :].flat:
      axes.set_visible(False)
    for (top, bottom), (group, entry) in zip(grid.T, members):
      _diagram(top, bottom, group, entry, looks[group])
    grid[0, 0].set_ylabel("accuracy, %")
    grid[1, 0].set_ylabel("predictions, %")
    part.align_ylabels(grid[:, 0])
  return drawing


def _diagram(top: Axes, bottom: Axes, group: Group, entry: Entry, look: style.Look) -> None:
  statistics = entry.statistics or {}
  bins = reliability(statistics)
  filled = bins["number"] > 0
  left = 100 * bins["edges"][:-1]
  width = 100 * np.diff(bins["edges"])
  fraction = 100 * bins["number"] / max(bins["number"].sum(), 1)
  confidence = 100 * bins["confidence"][filled]
  accuracy = 100 * bins["accuracy"][filled]
  bars: dict[str, Any] = {"align": "edge", "color": look.color, "alpha": 0.5}
  bars |= {"edgecolor": "white", "linewidth": 0.6}
  top.bar(left[filled], accuracy, width[filled], **bars)
  top.plot([0, 100], [0, 100], color="#7a828c", linewidth=1)
  top.plot(confidence, accuracy, **look.points, markersize=4.5, clip_on=False)
  top.set(xlim=(0, 100), ylim=(0, 100))
  separator = "\n" if group.variant else " "
  error = 100 * calibration_error(statistics["calibration"])
  top.set_title(f"{group.title},{separator}seed {entry.seed}: ECE {error:.2f} %")
  bottom.bar(left, fraction, width, **bars)
  place: dict[str, Any] = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 6.5}
  for index in np.flatnonzero(filled):
    # Above its bar, and inside of the panel.
    position = left[index] + width[index] / 2, min(fraction[index], 50) + 3
    bottom.text(*position, f"{bins['number'][index]:.0f}", **place)
  bottom.set(ylim=(0, 100), xlabel="confidence, %")
