"""Chooses the test examples of a segmentation that a report shows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report import style
from distill_jax.report.document import Block, Heading
from distill_jax.report.entries import Entry, Group, one_per_group, pairs, students
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.gallery import displayed, value_range
from distill_jax.tasks._class_figures.map_gallery import Row, draw_rows
from distill_jax.tasks._class_maps import no_class, thumbnails

_EACH = 2  # examples of each kind
_TITLES = {"teacher": "Teacher", "baseline": "Baseline", "student": "Distilled"}


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
  shown = _networks(predicted)
  gain = _gain(shown)
  rows = choose(gain)
  if not len(rows):
    return []
  pictures = [
    _row(row, reason, shown, references, labels, ignore_label) for row, reason in rows.items()
  ]
  seeds = sorted({entry.seed for entry in shown.values()})
  caption = (
    f"{_rule(gain, shown)} In the titles of maps: the mean IoU of this example. Of a volume the "
    f"middle slice is shown. Seed {', '.join(map(str, seeds))}."
  )
  draw = functools.partial(draw_rows, pictures, class_names)
  title = "Examples with labels and predictions"
  return [Heading("Examples"), *style.pictures("examples", title, caption, draw)]


def choose(gain: np.ndarray) -> dict[int, str]:
  """Returns {row: reason}: the examples with the largest gains and losses, and random ones.

  Args:
    gain: of each example, float [N]; NaN of those without a score. Where all are 0 or NaN the rows
      are random.
  """
  scored = np.flatnonzero(~np.isnan(gain))
  order = scored[np.argsort(-gain[scored], kind="stable")]
  rows = {row: "largest gain" for row in order[:_EACH].tolist() if gain[row] > 0}
  rows |= {row: "largest loss" for row in order[::-1][:_EACH].tolist() if gain[row] < 0}
  rest = [row for row in np.random.default_rng(0).permutation(scored).tolist() if row not in rows]
  return rows | dict.fromkeys(rest[: 3 * _EACH - len(rows)], "random")


def _networks(entries: Sequence[Entry]) -> dict[Group, Entry]:
  """Returns one entry per role, the last distilled student and the baseline of its seed."""
  by_group = one_per_group(entries)
  shown = {group: entry for group, entry in by_group.items() if group.role != "student"}
  distilled = students(entries)
  if distilled:
    shown[distilled[-1]] = by_group[distilled[-1]]
    matched = pairs(entries, distilled[-1])
    if matched:
      student, baseline = matched[0]
      shown |= {student.group: student, baseline.group: baseline}
  return shown


def _gain(shown: Mapping[Group, Entry]) -> np.ndarray:
  """Returns the distilled student's IoU minus the baseline's of each example; 0 without both, NaN
  without a label.
  """
  iou = {group.role: np.asarray((e.predictions or {})["iou"]) for group, e in shown.items()}
  if {"student", "baseline"} <= set(iou):
    return iou["student"] - iou["baseline"]
  return 0 * next(iter(iou.values()))


def _rule(gain: np.ndarray, shown: Mapping[Group, Entry]) -> str:
  if not {"student", "baseline"} <= {group.role for group in shown}:
    return f"{3 * _EACH} random test examples."
  name = next(group.variant for group in shown if group.role == "student")
  return (
    f"Of the {len(gain)} test examples the {_EACH} whose mean IoU gains most by distillation"
    f"{f' ({name})' if name else ''}, the {_EACH} that lose most, and {_EACH} random ones; more "
    "random ones where fewer gain or lose."
  )


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
    predicted[_TITLES[group.role]] = classes, float(predictions["iou"][row])
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
