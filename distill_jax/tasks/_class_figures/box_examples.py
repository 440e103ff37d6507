"""Chooses the test images of a detection that a report shows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report import style
from distill_jax.report.document import Block, Heading
from distill_jax.report.entries import Entry, Group
from distill_jax.tasks._class_figures.box_gallery import Box, Panel, Row, draw_rows
from distill_jax.tasks._class_figures.box_matches import Matches
from distill_jax.tasks._class_figures.examples import TITLES, choose, rule, seeds_of
from distill_jax.tasks._class_figures.gallery import displayed, value_range
from distill_jax.tasks._class_figures.labels import class_labels

_SCORE = "F1 at an IoU of 0.5"


def box_example_figures(
  shown: Mapping[Group, tuple[Entry, Matches]],
  references: Mapping[str, Any],
  class_names: Sequence[str],
) -> list[Block]:
  """Returns a picture of some test images with boxes; nothing without images.

  Args:
    shown: a network per role, and its matches.
    references: 'image' [N, H, W, channels], and 'id' [N] if present.
    class_names: one per class.
  """
  images = references.get("image")
  if images is None or np.ndim(images) != 4:
    return []
  thresholds = {group: matches.best_threshold() for group, (_, matches) in shown.items()}
  f1 = {g: matches.image_f1(thresholds[g]) for g, (_, matches) in shown.items()}
  by_role = {group.role: values for group, values in f1.items()}
  has_both = {"student", "baseline"} <= set(by_role)
  zero = np.zeros(len(images))
  gain = by_role["student"] - by_role["baseline"] if has_both else zero
  names = class_labels(class_names, 12)
  rows = []
  for row, reason in choose(gain).items():
    change = f", {100 * gain[row]:+.1f} points of F1".replace("-", "−") if has_both else ""
    ids = references.get("id")
    title = f"id {ids[row] if ids is not None else row}: {reason}{change}"
    panels = [_truth(next(iter(shown.values()))[1], row, names)]
    panels += [
      _detections(group, matches, row, names, thresholds[group], f1[group][row])
      for group, (_, matches) in shown.items()
    ]
    image = np.asarray(images[row])
    rows.append(Row(title, displayed(image, *value_range(image)), panels))
  if not rows:
    return []
  draw = functools.partial(draw_rows, rows)
  caption = _caption(len(images), shown, thresholds)
  return [Heading("Examples"), *style.pictures("examples", "Examples with boxes", caption, draw)]


def _truth(matches: Matches, row: int, names: Sequence[str]) -> Panel:
  truth = matches.truth
  boxes = [
    Box(
      tuple(truth.boxes[row, column].tolist()),
      names[truth.label[row, column]] + (" (crowd)" if truth.crowd[row, column] else ""),
      True,
    )
    for column in np.flatnonzero(truth.exists[row])
  ]
  return Panel("Truth", "", boxes)


def _detections(
  group: Group, matches: Matches, row: int, names: Sequence[str], threshold: float, f1: float
) -> Panel:
  """Returns the detections with scores above the threshold, those with the highest ones on top."""
  found = matches.found
  columns = np.flatnonzero(matches.counted[row] & (found.scores[row] >= threshold))
  boxes = [
    Box(
      tuple(found.boxes[row, column].tolist()),
      f"{names[found.classes[row, column]]} {found.scores[row, column]:.2f}".replace(" 0.", " ."),
      bool(matches.is_correct[row, column]),
    )
    for column in columns[np.argsort(found.scores[row, columns], kind="stable")]
  ]
  return Panel(f"{TITLES[group.role]}: F1 {100 * f1:.0f} %", group.role, boxes)


def _caption(
  number: int, shown: Mapping[Group, tuple[Entry, Matches]], thresholds: Mapping[Group, float]
) -> str:
  seeds = seeds_of(entry for entry, _ in shown.values())
  scores = ", ".join(
    f"{TITLES[group.role].lower()} {'–' if np.isinf(x) else format(x, '.2f')}"
    for group, x in thresholds.items()
  )
  return (
    f"{rule(number, shown, _SCORE)} Boxes have their class and score, dashed ones find no "
    "true box of their class. Each network shows, and F1 counts, the detections from the score on "
    f"that gives its best F1 over all test images: {scores}. Seed {seeds}."
  )
