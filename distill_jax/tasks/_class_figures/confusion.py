"""Draws confusion matrices."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from distill_jax.report import style
from distill_jax.report.document import Block, Heading
from distill_jax.report.entries import Entry, Group, one_per_group
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.labels import class_labels, names_or_numbers

MAX_COUNTS = 20  # classes up to which a matrix shows its counts


def confusion_figures(entries: Sequence[Entry], class_names: Sequence[str]) -> list[Block]:
  """Returns one matrix per group; nothing where no entry has 'confusion'."""
  counted = [entry for entry in few(entries) if "confusion" in (entry.statistics or {})]
  if not counted:
    return []
  matrices = {
    group: (entry.seed, np.asarray((entry.statistics or {})["confusion"]))
    for group, entry in one_per_group(counted).items()
  }
  _, first = next(iter(matrices.values()))
  names = names_or_numbers(class_names, len(first))
  caption = (
    "Rows are true classes, columns predictions; the color is the fraction of the row's examples"
    + (", the number their count." if len(names) <= MAX_COUNTS else ".")
    + _without_example(first, names)
  )
  title = "Confusion matrices"
  draw_page = functools.partial(draw, matrices, names)
  return [Heading(title), *style.pictures("confusion", title, caption, draw_page)]


def draw(
  matrices: Mapping[Group, tuple[int, np.ndarray]], names: Sequence[str], page: float = style.PAGE
) -> Figure:
  """Draws the matrices (seed, counts [C, C]) of all groups, colored by the fraction of the row."""
  classes = len(names)
  columns = style.columns_of(min(2 if 12 < classes <= MAX_COUNTS else 3, len(matrices)), page)
  rows = -(-len(matrices) // columns)
  positions = range(0, classes, 1 if classes <= MAX_COUNTS else -(-classes // 10))
  all_labels = class_labels(names, 14)
  labels = [all_labels[position] for position in positions]
  is_short = max(map(len, labels)) <= 2
  room = 0.085 * max(map(len, labels))  # inches that the labels take
  side = min(5.0, (page - 1.4 - room) / columns, 1.6 + 0.35 * classes)
  height = rows * (side + 0.7 + (0 if is_short else room))
  drawing = style.figure(1.4 + room + columns * side, height)
  grid = drawing.subplots(rows, columns, squeeze=False)
  for axes in grid.flat[len(matrices) :]:
    axes.set_axis_off()
  for axes, (group, (seed, counts)) in zip(grid.flat, matrices.items()):
    image = _matrix(axes, counts, side)
    axes.set(title=f"{group.title}, seed {seed}", xlabel="predicted class")
    axes.set_xticks(positions, labels, rotation=0 if is_short else 90, parse_math=False)
    in_first_column = axes in grid[:, 0]
    texts = labels if in_first_column else [""] * len(labels)
    axes.set_yticks(positions, texts, parse_math=False)
    axes.set_ylabel("true class" if in_first_column else "")
  _color_bar(drawing, image, grid)
  return drawing


def _matrix(axes: Axes, counts: np.ndarray, side: float) -> AxesImage:
  fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  # The square root makes few mistakes visible next to a full diagonal.
  image = axes.imshow(fractions, cmap="Blues", interpolation="nearest", norm=PowerNorm(0.5, 0, 1))
  axes.grid(False)
  if len(counts) > MAX_COUNTS:
    return image
  size = min(9, 72 * 0.78 * side / len(counts) / 2.6)
  for (row, column), count in np.ndenumerate(counts):
    if count:
      ink = "white" if fractions[row, column] > 0.4 else "#1c1f23"
      axes.text(column, row, f"{count}", ha="center", va="center", color=ink, fontsize=size)
  return image


def _color_bar(drawing: Figure, image: AxesImage, grid: np.ndarray) -> None:
  percent = PercentFormatter(1)
  shrink = 0.7 / len(grid)
  bar = drawing.colorbar(image, ax=grid, shrink=shrink, aspect=25, pad=0.01, format=percent)
  bar.set_label("fraction of the true class")
  bar.outline.set_visible(False)  # type: ignore[operator]


def _without_example(counts: np.ndarray, names: Sequence[str]) -> str:
  absent = np.flatnonzero(counts.sum(1) == 0)
  if not len(absent):
    return ""
  text = ", ".join(names[number] for number in absent[:10]) + (", …" if len(absent) > 10 else "")
  return f" Without a test example: {text} ({len(absent)} of {len(names)} classes)."
