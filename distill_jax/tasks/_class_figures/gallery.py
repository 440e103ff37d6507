"""Shows the images that only one of distilled student and baseline classifies correctly."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report import style
from distill_jax.report.document import Block, Heading, Text
from distill_jax.report.entries import Entry, pairs, students
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.labels import class_labels, names_or_numbers

MAX_IMAGES = 24
_CELL = 1.25  # inches: width of an image with its margins
_TEXT = 0.62  # inches: height of the text around an image


class Disagreement(NamedTuple):
  """Rows of the test split that only the distilled student, or only the baseline, gets correct."""

  won: np.ndarray
  lost: np.ndarray


def disagreement_figures(
  entries: Sequence[Entry], references: Mapping[str, Any], class_names: Sequence[str]
) -> list[Block]:
  """Returns a sentence per distilled student and the images that the last of them wins.

  Nothing without labels, or where no student and baseline of one seed have predictions.
  """
  predicted = [entry for entry in few(entries) if "class" in (entry.predictions or {})]
  by_student = [pairs(predicted, group) for group in students(predicted)]
  matched = [seeds[0] for seeds in by_student if seeds]
  labels = np.asarray(references.get("label", ()))
  if not matched or labels.ndim != 1 or not len(labels):
    return []
  blocks: list[Block] = [Heading("Where only the distilled student is correct")]
  for student, baseline in matched:
    won, lost = compare(student, baseline, labels)
    name = f" ({student.variant})" if student.variant else ""
    text = (
      f"Of {len(labels)} test examples (seed {student.seed}), the distilled student{name} is "
      f"correct and the baseline incorrect on {len(won)}; the opposite is the case on {len(lost)}."
    )
    blocks.append(Text(text))
  image = references.get("image")
  if image is not None and np.ndim(image) >= 4 and len(won):
    draw = functools.partial(gallery, won, references, baseline, class_names)
    which = "All" if len(won) <= MAX_IMAGES else f"The first {MAX_IMAGES} of the"
    caption = (
      f"{which} {len(won)}, in test order: the true class, which the distilled student{name} "
      "predicts, and the baseline's class."
    )
    title = "Correct when distilled, incorrect for the baseline"
    blocks += style.pictures("disagreements", title, caption, draw)
  return blocks


def compare(student: Entry, baseline: Entry, labels: np.ndarray) -> Disagreement:
  """Returns where correctness differs; rows without a label (negative) are in neither part."""
  distilled = _classes(student) == labels
  other = _classes(baseline) == labels
  return Disagreement(np.flatnonzero(distilled & ~other), np.flatnonzero(other & ~distilled))


def gallery(
  rows: np.ndarray,
  references: Mapping[str, Any],
  baseline: Entry,
  class_names: Sequence[str],
  page: float = style.PAGE,
) -> Figure:
  """Draws the first images of `rows`, in test order, with true class and the baseline's class.

  Args:
    rows: int [n], rows of the references.
    references: 'image' [N, H, W, channels], 'label' int [N] and, if present, 'id' [N]. Of clips and
      volumes [N, D, H, W, channels], and of several views, the middle ones are drawn.
    baseline: entry with predictions.
    class_names: one per class; empty: classes are named by their numbers.
    page: width in inches, which the figure does not exceed.

  Raises:
    ValueError: 'image' has fewer axes.
  """
  images = np.asarray(references["image"])
  if images.ndim < 4:
    raise ValueError(f"references['image']: expected [N, H, W, channels], got {images.shape}")
  while images.ndim > 4:
    images = images[:, images.shape[1] // 2]
  labels, predicted = np.asarray(references["label"]), _classes(baseline)
  ids = references.get("id", range(len(labels)))
  classes = len(class_names) or 1 + int(max(labels.max(), predicted.max()))
  names = class_labels(names_or_numbers(class_names, classes), 12)
  low, high = value_range(images)
  rows = rows[:MAX_IMAGES]
  drawing, panels = _panels(len(rows), images.shape[1] / images.shape[2], page)
  for axes, row in zip(panels, rows):
    pixels = displayed(images[row], low, high)
    axes.imshow(pixels, "gray", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"id {ids[row]}", fontsize=7.5, color="#5b636d", loc="center", pad=2)
    _write_below(axes, f"true: {names[labels[row]]}", 3, style.LOOKS["student"].color)
    _write_below(axes, f"baseline: {names[predicted[row]]}", 13, style.LOOKS["baseline"].color)
  return drawing


def _classes(entry: Entry) -> np.ndarray:
  return np.asarray((entry.predictions or {})["class"])


def _panels(number: int, ratio: float, page: float) -> tuple[Figure, list[Axes]]:
  """Returns a figure with places for `number` images whose height is `ratio` times their width."""
  image_width = min(_CELL - 0.12, 2 / ratio)
  line_height = image_width * ratio + _TEXT
  columns = min(int(page / _CELL), number)
  lines = -(-number // columns)
  width, height = columns * _CELL, lines * line_height
  drawing = Figure(figsize=(width, height))
  panels = []
  for index in range(number):
    line, column = divmod(index, columns)
    left = column * _CELL + (_CELL - image_width) / 2
    bottom = (lines - 1 - line) * line_height + _TEXT - 0.22
    size = image_width / width, image_width * ratio / height
    box = (left / width, bottom / height, *size)
    panels.append(drawing.add_axes(box, xticks=[], yticks=[], frame_on=False))
  return drawing, panels


def _write_below(axes: Axes, text: str, points: float, color: str) -> None:
  """Writes centered text `points` below the image."""
  axes.annotate(
    text,
    (0.5, 0),
    (0, -points),
    "axes fraction",
    "offset points",
    ha="center",
    va="top",
    fontsize=7.5,
    color=color,
    parse_math=False,
  )


def value_range(images: np.ndarray) -> tuple[float, float]:
  """Returns black and white: 0 and 255 of bytes, 0 and 1 of values between, else the extremes."""
  if images.dtype == np.uint8:
    return 0.0, 255.0
  low, high = float(images.min()), float(images.max())
  return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def displayed(image: np.ndarray, low: float, high: float) -> np.ndarray:
  """Returns [H, W, 3] in [0, 1], or [H, W], the mean of any other number of channels."""
  scaled = np.clip((image.astype(np.float32) - low) / ((high - low) or 1), 0, 1)
  return scaled if scaled.shape[-1] == 3 else scaled.mean(-1)
