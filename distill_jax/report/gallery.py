"""The images on which the student distilled and the student alone disagree about the truth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from distill_jax.report.results import Entry
from distill_jax.report.style import LOOKS, class_labels

SHOWN = 24  # images at most
_COLUMNS = 8
_CELL, _TEXT = 1.25, 0.62  # inches: width of a place, height of the text around an image


class Disagreement(NamedTuple):
  """Rows of the test split: where the distilled student alone is right, and where the other alone is."""

  won: np.ndarray
  lost: np.ndarray


def compare(student: Entry, baseline: Entry, labels) -> Disagreement:
  """Where the two predictions differ in being right; an unlabeled row (negative label) is in neither part."""
  labels = np.asarray(labels)
  distilled, alone = (np.asarray(e.logits).argmax(-1) == labels for e in (student, baseline))
  return Disagreement(np.flatnonzero(distilled & ~alone), np.flatnonzero(alone & ~distilled))


def gallery(
  rows: np.ndarray, images, ids, labels, baseline: Entry, class_names: Sequence[str]
) -> Figure:
  """The first images of `rows`, in test order, each with its true class and what the student alone said."""
  shown, names = rows[:SHOWN], class_labels(class_names, 12)
  said = np.asarray(baseline.logits).argmax(-1)
  images = np.asarray(images)
  low, high = _range(images)
  ratio = images.shape[1] / images.shape[2]
  width = min(_CELL - 0.12, 2 / ratio)
  columns, line = min(_COLUMNS, len(shown)), width * ratio + _TEXT
  lines = -(-len(shown) // columns)
  picture = Figure(figsize=(columns * _CELL, lines * line))
  for place, row in enumerate(shown):
    x, y = (
      place % columns * _CELL + (_CELL - width) / 2,
      (lines - 1 - place // columns) * line + _TEXT - 0.22,
    )
    box = (
      x / (columns * _CELL),
      y / (lines * line),
      width / (columns * _CELL),
      width * ratio / (lines * line),
    )
    axes = picture.add_axes(box, xticks=[], yticks=[], frame_on=False)
    axes.imshow(
      _displayed(images[row], low, high),
      "gray",
      aspect="auto",
      vmin=0,
      vmax=1,
      interpolation="nearest",
    )
    axes.set_title(f"id {ids[row]}", fontsize=7.5, color="#5b636d", loc="center", pad=2)
    _under(axes, f"true: {names[labels[row]]}", 3, LOOKS["student"].color)
    _under(axes, f"alone: {names[said[row]]}", 13, LOOKS["baseline"].color)
  return picture


def _under(axes, text: str, points: float, color: str) -> None:
  axes.annotate(
    text, (0.5, 0), (0, -points), "axes fraction", "offset points", ha="center", va="top", fontsize=7.5,
    color=color, parse_math=False,
  )  # fmt: skip


def _range(images: np.ndarray) -> tuple[float, float]:
  """Black and white: 0 and 255 for bytes, 0 and 1 for numbers within, else the split's extremes."""
  if images.dtype == np.uint8:
    return 0.0, 255.0
  low, high = float(images.min()), float(images.max())
  return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _displayed(image: np.ndarray, low: float, high: float) -> np.ndarray:
  """[H, W, 3] in [0, 1], or [H, W]: any number of channels but 3 is shown as their mean."""
  scaled = np.clip((image.astype(np.float32) - low) / ((high - low) or 1), 0, 1)
  return scaled if scaled.shape[-1] == 3 else scaled.mean(-1)
