"""Builds the parts of a report that show classes: confusion, calibration, gains, disagreements."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report.document import Block
from distill_jax.report.entries import Entry, groups, of_group
from distill_jax.report.variants import few
from distill_jax.tasks._boxes import Found, Truth
from distill_jax.tasks._class_figures.answers import span_figures
from distill_jax.tasks._class_figures.box_errors import error_figures
from distill_jax.tasks._class_figures.box_examples import box_example_figures
from distill_jax.tasks._class_figures.box_matches import match_boxes
from distill_jax.tasks._class_figures.calibration import calibration_figures, reliability
from distill_jax.tasks._class_figures.class_scores import class_score_figures
from distill_jax.tasks._class_figures.confusion import confusion_figures
from distill_jax.tasks._class_figures.examples import networks
from distill_jax.tasks._class_figures.gains import gain_figures
from distill_jax.tasks._class_figures.gallery import disagreement_figures
from distill_jax.tasks._class_figures.labels import names_or_numbers
from distill_jax.tasks._class_figures.map_examples import map_example_figures
from distill_jax.tasks._class_figures.precision_recall import precision_figures
from distill_jax.tasks._class_figures.sequences import sequence_figures
from distill_jax.tasks._class_figures.tags import tag_figures
from distill_jax.tasks._class_figures.transcripts import transcript_figures
from distill_jax.types import Metric

__all__ = [
  "box_figures",
  "calibration_figures",
  "class_figures",
  "map_figures",
  "reliability",
  "sequence_figures",
  "transcript_figures",
  "span_figures",
  "tag_figures",
]


def class_figures(
  entries: Sequence[Entry], references: Mapping[str, Any], class_names: Sequence[str] = ()
) -> list[Block]:
  """Returns the blocks of single-label classification; one whose inputs are missing is left out.

  Args:
    entries: networks whose `statistics` have 'calibration' [bins, 3] (examples, sum of their
      confidence, number correct), 'confusion' int [C, C] (rows labels, columns predictions) and
      'per_class' int [C, 3] (correct, predicted, labeled), and whose `predictions` have 'class'
      int [N].
    references: 'label' int [N], 'id' [N] and 'image' [N, H, W, channels] of the test split.
    class_names: C names; empty: classes are named by their numbers.

  Raises:
    ValueError: the number of names is not C, or 'image' has another number of axes.
  """
  return [
    *confusion_figures(entries, class_names),
    *calibration_figures(entries),
    *gain_figures(entries, class_names),
    *disagreement_figures(entries, references, class_names),
  ]


def map_figures(
  entries: Sequence[Entry],
  references: Mapping[str, Any],
  class_names: Sequence[str],
  *,
  pixels: np.ndarray,
  metrics: Mapping[int, Sequence[Metric]],
  label: str,
  ignore_label: int | None,
) -> list[Block]:
  """Returns the blocks of a segmentation; one whose inputs are missing is left out.

  Args:
    entries: networks with the scores of `metrics`, and `predictions` 'class' [N, ...] and 'iou'
      [N].
    references: the labels [N, ...], 'image' [N, ..., channels] and 'id' [N] of the test split.
    class_names: C names; empty: classes are named by their numbers.
    pixels: int [C], labeled pixels of each class.
    metrics: the scores of each class, IoU first.
    label: the entry with the labels.
    ignore_label: the label of pixels that do not count, in addition to negative ones.

  Raises:
    ValueError: the number of names is not C.
  """
  names = names_or_numbers(class_names, len(pixels))
  return [
    *class_score_figures(entries, pixels, metrics, names, counted="pixels"),
    *map_example_figures(entries, references, label, ignore_label, names),
  ]


def box_figures(
  entries: Sequence[Entry],
  found: Sequence[Found],
  truth: Truth,
  references: Mapping[str, Any],
  class_names: Sequence[str],
  *,
  precision: Callable[[Found], np.ndarray],
  metrics: Mapping[int, Sequence[Metric]],
) -> list[Block]:
  """Returns the blocks of a detection; its pictures show the first distilled students.

  Args:
    entries: networks with the scores of `metrics`.
    found: the detections of each.
    truth: the true boxes.
    references: 'image' [N, H, W, channels] and 'id' [N] of the test split, if present.
    class_names: C names; empty: classes are named by their numbers.
    precision: returns precision [2, 101] at IoU 0.5 and 0.75 of detections.
    metrics: the scores of each class.

  Raises:
    ValueError: the number of names is not C.
  """
  names = names_or_numbers(class_names, len(metrics))
  by_key = {(entry.group, entry.seed): one for entry, one in zip(entries, found)}
  first = few(entries)
  matches = {
    group: {e.seed: match_boxes(by_key[group, e.seed], truth) for e in of_group(first, group)}
    for group in groups(first)
  }
  curves = {
    group: [precision(one.found) for one in seeds.values()] for group, seeds in matches.items()
  }
  shown = {group: (entry, matches[group][entry.seed]) for group, entry in networks(first).items()}
  return [
    *class_score_figures(entries, truth.per_class(len(names)), metrics, names, counted="boxes"),
    *precision_figures(curves),
    *error_figures({group: list(seeds.values()) for group, seeds in matches.items()}),
    *box_example_figures(shown, references, names),
  ]
