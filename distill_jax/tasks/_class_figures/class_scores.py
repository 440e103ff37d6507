"""Shows the scores of each class of maps, boxes or tokens: words, a picture and a table."""

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

_DEPENDENT = {
  "boxes": "Images of one scene or camera",
  "entities": "Sentences of one document",
  "pixels": "Slices of one volume, or tiles of one region,",
  "tokens": "Sentences of one document",
}


def class_score_figures(
  entries: Sequence[Entry],
  counts: np.ndarray,
  metrics: Mapping[int, Sequence[Metric]],
  class_names: Sequence[str],
  *,
  counted: str,
) -> list[Block]:
  """Returns words and a picture on the first score of the classes, and a table of all of them.

  Args:
    entries: the networks.
    counts: int [C], what the test set has of each class, for results.json.
    metrics: the scores of each class that has some.
    class_names: one per class.
    counted: of what `counts` are: 'pixels', 'boxes', 'entities', 'tokens'.
  """
  title = next(iter(metrics.values()))[0].title
  first = few(entries)
  scores = _by_class(first, counts, metrics, class_names)
  blocks: list[Block] = [
    Numbers("classes", [{"name": n, counted: int(x)} for n, x in zip(class_names, counts)]),
    Heading("Scores by class"),
  ]
  distilled = compared(scores)
  if distilled:
    blocks += [Text(words(scores, group, title)) for group in distilled]
    draw = functools.partial(class_gains, scores, title=title)
    caption = _caption(scores, counted)
    blocks += style.pictures("classes", f"{title} by class", caption, draw)
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
  counts: np.ndarray,
  metrics: Mapping[int, Sequence[Metric]],
  class_names: Sequence[str],
) -> list[ClassScores]:
  """Returns the first score of the classes that each network of each seed has."""
  scores = []
  for number, (first, *_) in metrics.items():
    if not all(first.name in entry.scores for entry in entries):
      continue
    spreads = {group: over_seeds(entries, group, first.name) for group in groups(entries)}
    gains = {group: gain(entries, group, first.name) for group in students(entries)}
    scores.append(
      ClassScores(
        number,
        class_names[number],
        int(counts[number]),
        {group: spread for group, spread in spreads.items() if spread is not None},
        {group: spread for group, spread in gains.items() if spread is not None},
      )
    )
  return scores


def _caption(scores: Sequence[ClassScores], counted: str) -> str:
  group = compared(scores)[-1]
  name = group.variant or "the distilled student"
  caption = f"Means over seeds, and the gain of {name} over the baseline, paired by seed"
  if any(one.gain[group].interval for one in scores):
    caption += (
      ", with its 95 % confidence interval (the wide bar) over seeds and test examples. "
      f"{_DEPENDENT[counted]} are not independent: others differ more"
    )
  return f"{caption}."
