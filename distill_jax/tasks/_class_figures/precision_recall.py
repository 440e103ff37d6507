"""Draws precision against recall of detectors."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distill_jax.report import style
from distill_jax.report.document import Block, Heading
from distill_jax.report.entries import Group

_CAPTION = (
  "Precision of the test detections at each recall, interpolated as in COCO: the highest one at "
  "this recall or more, and 0 beyond the highest recall. Means over classes and seeds; the area "
  "under a curve is AP50, or AP75."
)


def precision_figures(curves: Mapping[Group, Sequence[np.ndarray]]) -> list[Block]:
  """Returns a picture of precision against recall, at IoU 0.5 and 0.75.

  Args:
    curves: of the seeds of each group, precision float [2, 101] at recalls from 0 to 1.
  """
  means = {group: np.mean(seeds, axis=0) for group, seeds in curves.items()}
  draw = functools.partial(_draw, means)
  pictures = style.pictures("precision", "Precision against recall", _CAPTION, draw)
  return [Heading("Precision and recall"), *pictures]


def _draw(curves: Mapping[Group, np.ndarray], page: float = style.PAGE) -> Figure:
  looks = style.looks(list(curves))
  columns = style.columns_of(2, page)
  drawing = style.figure(page, 3.9 if columns == 2 else 6.6)
  panels = drawing.subplots(2 // columns, columns, squeeze=False).ravel()
  recall = np.linspace(0, 100, 101)
  for index, (axes, iou) in enumerate(zip(panels, ("0.5", "0.75"))):
    for group, precision in curves.items():
      look = looks[group]
      axes.plot(
        recall,
        100 * precision[index],
        color=look.color,
        linestyle=look.line,
        label=group.title,
        marker=look.marker,
        markevery=20,
        markersize=5,
        clip_on=False,
      )
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall, %", ylabel="precision, %")
    axes.set_title(f"IoU of at least {iou}")
  lines, titles = panels[0].get_legend_handles_labels()
  style.legend(drawing, dict(zip(titles, lines)))
  return drawing
