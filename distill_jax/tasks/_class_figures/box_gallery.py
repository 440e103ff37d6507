"""Draws images with true boxes, and with the boxes that networks find."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from distill_jax.report import style

_TRUE_COLOR = "#007a5a"
_COLUMNS_OF_PHONE = 2
# Inches: the title of an example, that of a panel, and the space between panels.
_HEADER, _TITLE, _GAP, _LEGEND = 0.3, 0.28, 0.08, 0.35
_SOLID: Any = "-"
_DASHED: Any = (0, (2.2, 1.4))


class Box(NamedTuple):
  """A rectangle in an image.

  Attributes:
    corners: left, top, right, bottom in pixels.
    text: its class, and the score of a detection.
    is_correct: whether it is drawn with a solid line.
  """

  corners: tuple[float, float, float, float]
  text: str
  is_correct: bool


class Panel(NamedTuple):
  """Boxes of the truth or of a network; `role` gives the color, '' that of the truth."""

  title: str
  role: str
  boxes: list[Box]


class Row(NamedTuple):
  """A test example.

  Attributes:
    title: which one, and why it is here.
    image: [H, W, 3] or [H, W] from 0 to 1.
    panels: what is drawn on it, from left to right.
  """

  title: str
  image: np.ndarray
  panels: list[Panel]


def draw_rows(rows: Sequence[Row], page: float = style.PAGE) -> Figure:
  """Draws a line of panels per example, two on a phone, and a legend of the lines."""
  panels = len(rows[0].panels)
  columns = panels if page >= style.PAGE else min(_COLUMNS_OF_PHONE, panels)
  lines = -(-panels // columns)
  height, width = rows[0].image.shape[:2]
  # One or two panels need not be larger than those of a full line.
  side = min(page / columns, page / 3 if page >= style.PAGE else page / 2)
  line_height = _TITLE + min(2, height / width) * (side - _GAP)
  row_height = _HEADER + lines * line_height
  ratios = [*[row_height] * len(rows), _LEGEND]
  drawing = Figure(figsize=(side * columns, sum(ratios)))
  parts = drawing.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
  for part, row in zip(parts, rows):
    part.text(0.01, 1 - 0.12 / row_height, row.title, va="top", fontsize=9.5, parse_math=False)
    for index, panel in enumerate(row.panels):
      line, column = divmod(index, columns)
      bottom = (lines - 1 - line) * line_height + _GAP / 2
      corner = (column + _GAP / 2 / side) / columns, bottom / row_height
      size = (1 - _GAP / side) / columns, (line_height - _TITLE) / row_height
      _show(part.add_axes((*corner, *size), xticks=[], yticks=[]), row.image, panel)
  colors = dict.fromkeys(panel.role for row in rows for panel in row.panels if panel.role)
  handles = [
    Line2D([], [], color="#3d3d3d", linestyle=line, label=text)
    for line, text in ((_SOLID, "correct"), (_DASHED, "wrong"))
  ]
  parts[-1].legend(handles=handles if colors else [], loc="center", ncols=2, fontsize=8.5)
  return drawing


def _show(axes: Axes, image: np.ndarray, panel: Panel) -> None:
  height, width = image.shape[:2]
  color = style.LOOKS[panel.role].color if panel.role else _TRUE_COLOR
  for spine in axes.spines.values():
    spine.set(visible=True, color="#d8dde3", linewidth=0.6)
  axes.grid(False)
  axes.imshow(image, "gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, width, height, 0))
  axes.set(xlim=(0, width), ylim=(height, 0))
  axes.set_title(panel.title, fontsize=8, loc="center", pad=3, color=color)
  for box in panel.boxes:
    left, top, right, bottom = box.corners
    rectangle = Rectangle((left, top), right - left, bottom - top, fill=False)
    line = _SOLID if box.is_correct else _DASHED
    rectangle.set(edgecolor=color, linewidth=1.3, linestyle=line)
    # A light seam on both sides: no color is seen on all images.
    rectangle.set_path_effects([withStroke(linewidth=2.6, foreground="#ffffffc0")])
    axes.add_patch(rectangle)
  for box in panel.boxes:
    _write(axes, box, color, width, height)


def _write(axes: Axes, box: Box, color: str, width: int, height: int) -> None:
  """Writes a box's text above its left top corner; below it at the image's upper edge."""
  left = float(np.clip(box.corners[0], 0, width))
  top = float(np.clip(box.corners[1], 0, height))
  is_above = top > 0.07 * height
  is_left = left < 0.75 * width
  axes.annotate(
    box.text,
    (left if is_left else float(np.clip(box.corners[2], 0, width)), top),
    (1 if is_left else -1, 1.5 if is_above else -1.5),
    "data",
    "offset points",
    ha="left" if is_left else "right",
    va="bottom" if is_above else "top",
    fontsize=6.5,
    color="white",
    parse_math=False,
    annotation_clip=True,
    bbox={"boxstyle": "square,pad=0.12", "facecolor": color, "edgecolor": "none", "alpha": 0.85},
  )
