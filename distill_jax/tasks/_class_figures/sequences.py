"""Shows generated sequences: source, reference, and what the networks wrote."""

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

WORST = 2  # examples with the lowest score
_MAX_TEXT = 400  # characters
_EMPTY = "(empty)"


def sequence_figures(
  entries: Sequence[Entry],
  references: Mapping[str, Any],
  *,
  true: Sequence[str],
  texts: Callable[[np.ndarray], list[str]],
  source_texts: Callable[[np.ndarray], list[str]] | None,
  scores: Callable[[np.ndarray], np.ndarray],
  title: str,
  form: str,
  sign: int = 1,
) -> list[Block]:
  """Returns a table for each of some test examples.

  Args:
    entries: networks whose `predictions` have 'tokens' int [N, L] and 'label' int [N, T], -1 where
      there is none.
    references: 'source' int [N, S], 'source_segments' int [N, S] and 'id' [N] of the test split, if
      present.
    true: N references.
    texts: decodes rows of tokens.
    source_texts: the same for sources; None: they are not shown.
    scores: rows of tokens [N, L] -> the score of each, float [N].
    title: of the score.
    form: a format specification of it.
    sign: -1 where lower scores are better.
  """
  shown = networks(few(entries))
  tokens = {g: np.asarray((entry.predictions or {})["tokens"]) for g, entry in shown.items()}
  labeled = (np.asarray((entries[0].predictions or {})["label"]) >= 0).any(1)
  values = {g: np.where(labeled, sign * scores(rows), np.nan) for g, rows in tokens.items()}
  by_role = {group.role: x for group, x in values.items()}
  rows = choose_sequences(by_role)
  if not rows:
    return []
  sources = _sources(references, rows, source_texts)
  name = "distilled student" if "student" in by_role else next(iter(shown)).title.lower()
  blocks: list[Block] = [
    Heading("Examples"),
    Text(
      f"{rule(len(true), shown, title)} Then the {WORST} others with the worst {title} of the "
      f"{name}. Seed {seeds_of(shown.values())}."
    ),
  ]
  ids = references.get("id")
  for row, reason in rows.items():
    lines = [["Source", sources[row], ""]] if row in sources else []
    lines.append(["Reference", true[row], ""])
    for group in shown:
      score = sign * values[group][row]
      text = texts(tokens[group][row : row + 1])[0]
      lines.append([TITLES[group.role], text, "" if np.isnan(score) else format(score, form)])
    cells = [[first, shorten(text), score] for first, text, score in lines]
    blocks.append(Text(f"id {ids[row] if ids is not None else row}: {reason}"))
    blocks.append(Table(["", "Text", title], cells, numeric=False))
  return blocks


def choose_sequences(scores: Mapping[str, np.ndarray]) -> dict[int, str]:
  """Returns {row: reason}: largest gains and losses, random ones, and the lowest scores."""
  rows = choose(gain_of(scores))
  main = scores.get("student", next(iter(scores.values())))
  order = [row for row in np.argsort(main, kind="stable").tolist() if not np.isnan(main[row])]
  worst = [row for row in order if row not in rows][:WORST]
  return rows | dict.fromkeys(worst, "among the worst")


def _sources(
  references: Mapping[str, Any],
  rows: Mapping[int, str],
  texts: Callable[[np.ndarray], list[str]] | None,
) -> dict[int, str]:
  """Returns the source of each row; {} where there are none."""
  source, segments = (references.get(name) for name in ("source", "source_segments"))
  if source is None or texts is None:
    return {}
  index = np.array(list(rows))
  tokens = np.asarray(source)[index]
  if segments is not None:
    tokens = np.where(np.asarray(segments)[index] < 0, -1, tokens)
  return dict(zip(rows, texts(tokens)))


def shorten(text: str) -> str:
  """Returns a text on one line, cut where it is long."""
  text = " ".join(text.split()) or _EMPTY
  return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
