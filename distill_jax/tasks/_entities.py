"""Entities in sequences of IOB tags, by seqeval."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.errors import naming_extras

_TAG = re.compile(r"[BIES]-.+")
_OUTSIDE = "O"


def is_iob(names: Sequence[str]) -> bool:
  """Returns whether names of classes are IOB tags: 'O', 'B-person', 'I-person', ...

  Raises:
    ValueError: some are, and others are not.
  """
  others = [name for name in names if name != _OUTSIDE and not _TAG.fullmatch(name)]
  tags = [name for name in names if _TAG.fullmatch(name)]
  if tags and others:
    raise ValueError(
      f"class_names: expected IOB tags ('O', 'B-...', 'I-...') for all classes or for none, got "
      f"{others[0]!r} next to {tags[0]!r}: rename one"
    )
  return bool(tags)


def entity_types(names: Sequence[str]) -> list[str]:
  """Returns the types of entities that IOB tags name, in their order."""
  return list(dict.fromkeys(name[2:] for name in names if name != _OUTSIDE))


def count_entities(labels: np.ndarray, names: Sequence[str]) -> Counter[str]:
  """Returns the number of entities of each type in labels int [N, L], negative ones left out."""
  sequences = _sequences(labels, labels >= 0, names)
  return Counter(kind for kind, _, _ in _seqeval().get_entities(sequences))


def entity_scores(
  predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
  """Returns precision, recall and F1 of entities of all types ('f1', as in CoNLL), and the F1 of
  each type ('f1/person').

  An entity is correct where its type and both ends are. A type that neither occurs nor is predicted
  has no score.

  Args:
    predicted: classes, int [N, L].
    labels: int [N, L]; negative where a token does not count.
    names: IOB tags, one per class.
  """
  counted = labels >= 0
  entities = [
    set(_seqeval().get_entities(_sequences(x, counted, names))) for x in (labels, predicted)
  ]
  true, found, correct = (
    Counter(kind for kind, _, _ in some) for some in (*entities, entities[0] & entities[1])
  )
  if not true and not found:
    return {}
  scores = {
    "precision": correct.total() / max(found.total(), 1),
    "recall": correct.total() / max(true.total(), 1),
    "f1": 2 * correct.total() / (true.total() + found.total()),
  }
  kinds = true | found
  return scores | {f"f1/{x}": 2 * correct[x] / (true[x] + found[x]) for x in sorted(kinds)}


def _sequences(classes: np.ndarray, counted: np.ndarray, names: Sequence[str]) -> list[list[str]]:
  tags = np.asarray(names, object)
  return [tags[row[valid]].tolist() for row, valid in zip(classes, counted)]


def _seqeval() -> Any:
  with naming_extras():
    from seqeval.metrics import sequence_labeling  # an extra, which entities alone need
  return sequence_labeling
