"""Draws label maps next to the maps that the networks predict, and where these are wrong."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from distill_jax.report import style
from distill_jax.tasks._class_figures.labels import class_labels

# Okabe and Ito's palette: readers with any color vision can distinguish its colors. Those of wrong
# pixels come last.
_COLORS = (
  "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#d55e00",
)  # fmt: skip
_OTHERS = "#ffffff"
_IGNORED = "#b5b5b5"
_BOTH_WRONG = "#3d3d3d"
_COLUMNS_OF_PHONE = 3
# Inches: the title of an example, that of a panel, and the space between panels.
_HEADER, _TITLE, _GAP = 0.3, 0.28, 0.08


class Row(NamedTuple):
  """A test example.

  Attributes:
    title: which one, and why it is here.
    image: [H, W, 3] or [H, W] from 0 to 1; or None.
    label: int [H, W]; negative where no label counts.
    predicted: {title of a network: (int [H, W], mean IoU)}; negative where there is no class.
    wrong: bool [H, W] of the baseline and of the distilled student; or None.
  """

  title: str
  image: np.ndarray | None
  label: np.ndarray
  predicted: dict[str, tuple[np.ndarray, float]]
  wrong: tuple[np.ndarray, np.ndarray] | None


def draw_rows(rows: Sequence[Row], class_names: Sequence[str], page: float = style.PAGE) -> Figure:
  """Draws a line of panels per example (several on a phone), and a legend of the colors."""
  colors = _colors(rows, len(class_names))
  panels = len(_panels(rows[0], colors))
  columns = panels if page >= style.PAGE else min(_COLUMNS_OF_PHONE, panels)
  lines = -(-panels // columns)
  height, width = rows[0].label.shape
  side = page / columns
  line_height = _TITLE + min(2, height / width) * (side - _GAP)
  row_height = _HEADER + lines * line_height
  handles = _legend(rows, class_names, colors)
  legend_columns = 4 if page >= style.PAGE else 2
  legend_height = 0.15 + 0.22 * -(-len(handles) // legend_columns)
  ratios = [*[row_height] * len(rows), legend_height]
  drawing = Figure(figsize=(page, sum(ratios)))
  parts = drawing.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
  for part, row in zip(parts, rows):
    part.text(0.01, 1 - 0.16 / row_height, row.title, va="top", fontsize=9.5, parse_math=False)
    for index, (title, pixels) in enumerate(_panels(row, colors)):
      line, column = divmod(index, columns)
      left = column * side + _GAP / 2
      bottom = (lines - 1 - line) * line_height + _GAP / 2
      size = (side - _GAP) / page, (line_height - _TITLE) / row_height
      box = (left / page, bottom / row_height, *size)
      _show(part.add_axes(box, xticks=[], yticks=[]), title, pixels)
  parts[-1].legend(handles=handles, loc="center", ncols=legend_columns, fontsize=8.5)
  return drawing


def _show(axes: Axes, title: str, pixels: np.ndarray) -> None:
  for spine in axes.spines.values():
    spine.set(visible=True, color="#d8dde3", linewidth=0.6)
  axes.imshow(pixels, "gray", vmin=0, vmax=1, interpolation="nearest")
  axes.set_title(title, fontsize=8, loc="center", pad=3)


def _panels(row: Row, colors: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """Returns titles and pixels."""
  panels = [] if row.image is None else [("Image", row.image)]
  panels.append(("Label", colors[row.label]))
  panels += [
    (f"{title}: {100 * iou:.1f} %", colors[np.where(row.label < 0, -1, classes)])
    for title, (classes, iou) in row.predicted.items()
  ]
  if row.wrong is not None:
    panels.append(("Wrong pixels", _wrong_pixels(*row.wrong, row.label < 0)))
  return panels


def _wrong_pixels(baseline: np.ndarray, student: np.ndarray, ignored: np.ndarray) -> np.ndarray:
  pixels = np.ones((*ignored.shape, 3))
  pixels[baseline & ~student] = to_rgb(style.LOOKS["baseline"].color)
  pixels[student & ~baseline] = to_rgb(style.LOOKS["student"].color)
  pixels[student & baseline] = to_rgb(_BOTH_WRONG)
  pixels[ignored] = to_rgb(_IGNORED)
  return pixels


def _colors(rows: Sequence[Row], classes: int) -> np.ndarray:
  """Returns a color per class [C + 1, 3], and that of ignored pixels as the last; with more than 8
  classes the 7 that have most pixels here have a color of their own.
  """
  colors = np.array([to_rgb(_OTHERS)] * classes + [to_rgb(_IGNORED)])
  numbers = list(range(classes))
  if classes > len(_COLORS):
    maps = [m for row in rows for m in (row.label, *(one for one, _ in row.predicted.values()))]
    counts = sum(np.bincount(m[m >= 0].ravel(), minlength=classes) for m in maps)
    numbers = np.argsort(-counts, kind="stable")[: len(_COLORS) - 1].tolist()
  for number, color in zip(sorted(numbers), _COLORS):
    colors[number] = to_rgb(color)
  return colors


def _legend(rows: Sequence[Row], class_names: Sequence[str], colors: np.ndarray) -> list[Patch]:
  names = class_labels(class_names, 24)
  others = np.array(to_rgb(_OTHERS))
  is_named = [not np.array_equal(color, others) for color in colors[:-1]]
  texts = {name: colors[i] for i, name in enumerate(names) if is_named[i]}
  if not all(is_named):
    texts[f"{len(names) - sum(is_named)} other classes"] = others
  if any((row.label < 0).any() for row in rows):
    texts["ignored"] = colors[-1]
  if any(row.wrong is not None for row in rows):
    texts["wrong: baseline only"] = to_rgb(style.LOOKS["baseline"].color)
    texts["wrong: distilled only"] = to_rgb(style.LOOKS["student"].color)
    texts["wrong: both"] = to_rgb(_BOTH_WRONG)
  return [Patch(facecolor=color, edgecolor="#5b636d", label=text) for text, color in texts.items()]
