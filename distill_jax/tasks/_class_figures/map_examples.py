"""Chooses the test examples of a segmentation that a report shows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report import style
from distill_jax.report.document import Block, Heading
from distill_jax.report.entries import Entry, Group
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.examples import (
  TITLES,
  choose,
  gain_of,
  networks,
  rule,
  seeds_of,
)
from distill_jax.tasks._class_figures.gallery import displayed, value_range
from distill_jax.tasks._class_figures.map_gallery import Row, draw_rows
from distill_jax.tasks._class_maps import no_class, thumbnails


def map_example_figures(
  entries: Sequence[Entry],
  references: Mapping[str, Any],
  label: str,
  ignore_label: int | None,
  class_names: Sequence[str],
) -> list[Block]:
  """Returns a picture of some test examples; nothing without labels, predictions or a grid of at
  least two axes.

  Args:
    entries: networks whose `predictions` have 'class' [N, ...] and 'iou' [N].
    references: the labels, and 'image' [N, ..., channels] and 'id' [N] if present.
    label: the entry with the labels.
    ignore_label: in addition to negative ones.
    class_names: one per class.
  """
  predicted = [entry for entry in few(entries) if "iou" in (entry.predictions or {})]
  labels = references.get(label)
  if not predicted or labels is None or np.ndim(labels) < 3:
    return []
  shown = networks(predicted)
  gain = _gain(shown)
  rows = choose(gain)
  if not len(rows):
    return []
  pictures = [
    _row(row, reason, shown, references, labels, ignore_label) for row, reason in rows.items()
  ]
  caption = (
    f"{rule(len(gain), shown, 'mean IoU')} In the titles of maps: the mean IoU of this example. Of "
    f"a volume the middle slice is shown. Seed {seeds_of(shown.values())}."
  )
  draw = functools.partial(draw_rows, pictures, class_names)
  title = "Examples with labels and predictions"
  return [Heading("Examples"), *style.pictures("examples", title, caption, draw)]


def _gain(shown: Mapping[Group, Entry]) -> np.ndarray:
  """Returns the distilled student's IoU minus the baseline's of each example; 0 without both, NaN
  without a label.
  """
  return gain_of({g.role: np.asarray((e.predictions or {})["iou"]) for g, e in shown.items()})


def _row(
  row: int,
  reason: str,
  shown: Mapping[Group, Entry],
  references: Mapping[str, Any],
  labels: Any,
  ignore_label: int | None,
) -> Row:
  true = thumbnails(np.asarray(labels[row])[None])[0].astype(int)
  if ignore_label is not None:
    true = np.where(true == ignore_label, -1, true)
  predicted, wrong = {}, {}
  for group, entry in shown.items():
    predictions = entry.predictions or {}
    compact = thumbnails(predictions["class"][row][None])[0]
    classes = np.where(compact == no_class(compact), -1, compact.astype(int))
    predicted[TITLES[group.role]] = classes, float(predictions["iou"][row])
    wrong[group.role] = (classes != true) & (true >= 0)
  ids = references.get("id")
  pair = (wrong["baseline"], wrong["student"]) if {"baseline", "student"} <= set(wrong) else None
  change = _change(shown, row)
  title = f"id {ids[row] if ids is not None else row}: {reason}{change}"
  return Row(title, _image(references.get("image"), row, np.ndim(labels)), true, predicted, pair)


def _change(shown: Mapping[Group, Entry], row: int) -> str:
  if not {"student", "baseline"} <= {group.role for group in shown}:
    return ""
  return f", {100 * _gain(shown)[row]:+.1f} points of IoU".replace("-", "−")


def _image(images: Any, row: int, axes: int) -> np.ndarray | None:
  """Returns the example's image, or its middle slice, from 0 to 1; None where none fits labels of
  so many axes.
  """
  if images is None or np.ndim(images) not in (axes, axes + 1):
    return None
  image = np.asarray(images[row])
  if np.ndim(images) == axes:
    image = image[..., None]
  image = image[tuple(size // 2 for size in image.shape[:-3])]
  return displayed(image, *value_range(image))
