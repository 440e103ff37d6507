"""Shows answers of a passage: the label's, and those of the networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report.document import Block, Heading, Table, Text
from distill_jax.report.entries import Entry
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.examples import (
  TITLES,
  choose,
  gain_of,
  networks,
  rule,
  seeds_of,
)
from distill_jax.tasks._spans import answers

_MAX_ANSWER = 80  # characters
_NO_ANSWER = "(no answer)"


def span_figures(
  entries: Sequence[Entry],
  references: Mapping[str, Any],
  *,
  tokens: str,
  decode: Callable[[np.ndarray], str],
) -> list[Block]:
  """Returns a table of some test examples; nothing without token ids.

  Args:
    entries: networks whose `predictions` have 'f1' [N], 'start', 'end', 'true_start' and 'true_end'
      int [N] (-1: no answer).
    references: token ids [N, L] and 'id' [N] of the test split, if present.
    tokens: the entry with token ids.
    decode: maps the ids of an answer to text.
  """
  predicted = [entry for entry in few(entries) if "true_start" in (entry.predictions or {})]
  if not predicted or references.get(tokens) is None:
    return []
  shown = networks(predicted)
  rows = choose(gain_of({group.role: _rows(entry)["f1"] for group, entry in shown.items()}))
  if not rows:
    return []
  index = np.array(list(rows))
  ids = np.asarray(references[tokens])[index]
  some = {name: x[index] for name, x in _rows(predicted[0]).items()}
  columns = {"Label": answers(decode, ids, some, "true_")}
  for group, entry in shown.items():
    some = {name: x[index] for name, x in _rows(entry).items()}
    columns[TITLES[group.role]] = answers(decode, ids, some)
  numbers = references.get("id")
  titles = [f"{numbers[row] if numbers is not None else row}: {rows[row]}" for row in rows]
  texts = zip(*([_short(text) for text in column] for column in columns.values()))
  return [
    Heading("Examples"),
    Text(f"{rule(len(_rows(predicted[0])['f1']), shown, 'F1')} Seed {seeds_of(shown.values())}."),
    Table(["id", *columns], [[title, *row] for title, row in zip(titles, texts)], numeric=False),
  ]


def _rows(entry: Entry) -> Mapping[str, np.ndarray]:
  return {name: np.asarray(x) for name, x in (entry.predictions or {}).items()}


def _short(text: str) -> str:
  text = " ".join(text.split()) or _NO_ANSWER
  return text if len(text) <= _MAX_ANSWER else f"{text[: _MAX_ANSWER - 1]}…"
