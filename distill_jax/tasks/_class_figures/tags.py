"""Builds the parts of a report that show tags: scores of each class, calibration, and sentences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report.document import Block, Code, Heading, Text
from distill_jax.report.entries import Entry, Group
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.calibration import calibration_figures
from distill_jax.tasks._class_figures.class_scores import class_score_figures
from distill_jax.tasks._class_figures.examples import (
  TITLES,
  choose,
  gain_of,
  networks,
  rule,
  seeds_of,
)
from distill_jax.tasks._class_figures.labels import names_or_numbers
from distill_jax.tasks._entities import count_entities, entity_types
from distill_jax.types import Metric

_WIDTH = 88  # characters of a line
_MAX_WORD = 24
_SAME = "·"  # in place of a prediction that equals the label


def tag_figures(
  entries: Sequence[Entry],
  references: Mapping[str, Any],
  class_names: Sequence[str],
  *,
  has_entities: bool,
  tokens: str,
  decode: Callable[[np.ndarray], Sequence[str]] | None,
) -> list[Block]:
  """Returns the blocks of tagging; one whose inputs are missing is left out.

  Args:
    entries: networks with the scores 'f1/NAME', the `statistics` of classification, and
      `predictions` 'class' and 'label', int [N, L].
    references: token ids [N, L] and 'id' [N] of the test split, if present.
    class_names: C names; empty: classes are named by their numbers.
    has_entities: whether the names are IOB tags; scores are then those of types of entities.
    tokens: the entry with token ids.
    decode: maps the ids of an example to as many words; None: no words are shown.

  Raises:
    ValueError: the number of names is not C.
  """
  predicted = [entry for entry in entries if "label" in (entry.predictions or {})]
  if not predicted:
    return []
  labels = np.asarray((predicted[0].predictions or {})["label"])
  classes = len(np.asarray((predicted[0].statistics or {})["per_class"]))
  names = names_or_numbers(class_names, classes)
  if has_entities:
    kinds, number = entity_types(names), count_entities(labels, names)
    counts = np.array([number[kind] for kind in kinds])
  else:
    kinds, counts = names, np.bincount(labels[labels >= 0], minlength=classes)
  metrics = {i: [Metric(f"f1/{x}", "F1", "%", format=".2%")] for i, x in enumerate(kinds)}
  counted = "entities" if has_entities else "tokens"
  scored = class_score_figures(predicted, counts, metrics, kinds, counted=counted)
  words = None if decode is None else references.get(tokens)
  return [
    *scored,
    *calibration_figures(predicted),
    *_example_figures(few(predicted), labels, names, references.get("id"), words, decode),
  ]


def _example_figures(
  entries: Sequence[Entry],
  labels: np.ndarray,
  names: Sequence[str],
  ids: Any,
  tokens: Any,
  decode: Callable[[np.ndarray], Sequence[str]] | None,
) -> list[Block]:
  """Returns sentences with the tags that differ from the label."""
  shown = networks(entries)
  classes = {g: np.asarray((entry.predictions or {})["class"]) for g, entry in shown.items()}
  gain = _gain(classes, labels)
  rows = choose(gain)
  if not rows:
    return []
  blocks: list[Block] = [
    Heading("Examples"),
    Text(
      f"{rule(len(gain), shown, 'token accuracy')} {_SAME} marks a tag that equals the label. Seed "
      f"{seeds_of(shown.values())}."
    ),
  ]
  for row, reason in rows.items():
    counted = labels[row] >= 0
    lines = {"Label": [names[number] for number in labels[row][counted]]}
    if tokens is not None and decode is not None:
      words = np.asarray(decode(np.asarray(tokens[row])), object)
      lines = {"": [str(word)[:_MAX_WORD] for word in words[counted]]} | lines
    for group, predicted in classes.items():
      lines[TITLES[group.role]] = [
        _SAME if one == true else names[one] if one >= 0 else "NaN"
        for one, true in zip(predicted[row][counted], labels[row][counted])
      ]
    title = f"id {ids[row] if ids is not None else row}: {reason}"
    blocks.append(Code("\n".join([title, *_columns(lines)])))
  return blocks


def _gain(classes: Mapping[Group, np.ndarray], labels: np.ndarray) -> np.ndarray:
  """Returns the distilled student's token accuracy minus the baseline's of each example; 0 without
  both, NaN without a label.
  """
  counted = labels >= 0
  number = counted.sum(1)
  correct = {
    group.role: ((predicted == labels) & counted).sum(1) for group, predicted in classes.items()
  }
  return np.where(number > 0, gain_of(correct) / np.maximum(number, 1), np.nan)


def _columns(lines: Mapping[str, Sequence[str]]) -> list[str]:
  """Returns the lines with their items one below the other, broken where they are too long."""
  margin = max(map(len, lines))
  widths = [max(map(len, column)) for column in zip(*lines.values())]
  texts, first = [], 0
  while first < len(widths):
    last, length = first + 1, margin + 1 + widths[first]
    while last < len(widths) and length + 1 + widths[last] <= _WIDTH:
      length += 1 + widths[last]
      last += 1
    part = slice(first, last)
    texts += [
      " ".join([title.ljust(margin), *(x.ljust(n) for x, n in zip(items[part], widths[part]))])
      for title, items in lines.items()
    ]
    first = last
  return [text.rstrip() for text in texts]
