"""Shows the scores of each class of a segmentation: words, a picture and a table."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.report import comparison, style
from distill_jax.report.document import Block, Heading, Numbers, Text
from distill_jax.report.entries import Entry, gain, groups, over_seeds, students
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.gains import (
  MAX_NAMES,
  ClassScores,
  class_gains,
  compared,
  words,
)
from distill_jax.types import Metric

_TITLE = "IoU"


def map_score_figures(
  entries: Sequence[Entry],
  pixels: np.ndarray,
  metrics: Mapping[int, Sequence[Metric]],
  class_names: Sequence[str],
) -> list[Block]:
  """Returns words and a picture on the IoU of the classes, and a table of all their scores.

  Args:
    entries: the networks.
    pixels: int [C], the test set's labeled pixels of each class, for results.json.
    metrics: the scores of each class that has some, IoU first.
    class_names: one per class.
  """
  first = few(entries)
  scores = _by_class(first, pixels, metrics, class_names)
  blocks: list[Block] = [
    Numbers("classes", [{"name": n, "pixels": int(x)} for n, x in zip(class_names, pixels)]),
    Heading("Scores by class"),
  ]
  distilled = compared(scores)
  if distilled:
    blocks += [Text(words(scores, group, _TITLE)) for group in distilled]
    draw = functools.partial(class_gains, scores, title=_TITLE)
    blocks += style.pictures("classes", "IoU by class", _caption(scores), draw)
  if len(scores) <= MAX_NAMES:
    rows = [
      dataclasses.replace(metric, title=f"{metric.title} of {class_names[number]}")
      for number, some in metrics.items()
      for metric in some
    ]
    blocks += comparison.tables(first, rows, costs=False)
    if any(len(some) > 2 for some in metrics.values()):
      blocks.append(Text("Intervals of HD95 and of Dice per case cover the seeds, not the cases."))
  return blocks if len(blocks) > 2 else blocks[:1]


def _by_class(
  entries: Sequence[Entry],
  pixels: np.ndarray,
  metrics: Mapping[int, Sequence[Metric]],
  class_names: Sequence[str],
) -> list[ClassScores]:
  """Returns the IoU of the classes that each network of each seed has."""
  scores = []
  for number, (iou, *_) in metrics.items():
    if not all(iou.name in entry.scores for entry in entries):
      continue
    spreads = {group: over_seeds(entries, group, iou.name) for group in groups(entries)}
    gains = {group: gain(entries, group, iou.name) for group in students(entries)}
    scores.append(
      ClassScores(
        number,
        class_names[number],
        int(pixels[number]),
        {group: spread for group, spread in spreads.items() if spread is not None},
        {group: spread for group, spread in gains.items() if spread is not None},
      )
    )
  return scores


def _caption(scores: Sequence[ClassScores]) -> str:
  group = compared(scores)[-1]
  name = group.variant or "the distilled student"
  caption = f"Means over seeds, and the gain of {name} over the baseline, paired by seed"
  if any(one.gain[group].interval for one in scores):
    caption += (
      ", with its 95 % confidence interval (the wide bar) over seeds and test examples. Slices of "
      "one volume, or tiles of one region, are not independent: other volumes differ more"
    )
  return f"{caption}."
