"""Answers that are spans of a text."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.errors import check_integer
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.objectives.class_labels import check_ignore_label, class_labels
from distill_jax.tasks._spans import (
  NO_ANSWER,
  Spans,
  answers,
  best_spans,
  overlap_f1,
  text_scores,
)
from distill_jax.tasks.logits import AGREEMENT, OUTSIDE, count_outside, means
from distill_jax.types import Batch, Metric, Outputs, Task

Decode = Callable[[np.ndarray], str]

_METRICS = (
  Metric("f1", "F1", "%", "max", ".2%"),
  Metric("exact", "exact match", "%", "max", ".2%"),
  Metric("answerable_f1", "F1 of questions with an answer", "%", "max", ".2%", detail=2),
  Metric("no_answer", "accuracy of questions without one", "%", "max", ".2%", detail=2),
  AGREEMENT,
)


def spans(
  *,
  start: str = "start",
  end: str = "end",
  inside: str | None = None,
  max_length: int = 30,
  ignore_label: int | None = None,
  tokens: str = "tokens",
  decode: Decode | None = None,
) -> Task:
  """Returns the task of logits [B, L] of the first and of the last token of an answer, and labels
  int [B] with their positions.

  Predicted is the span of at most `max_length` tokens, start <= end, with the highest sum of both
  logits. With `inside` only tokens of the passage are in it, and a question may have no answer: its
  labels are 0 and 0, where token 0 is not inside ([CLS]); none is predicted where token 0 has a
  higher sum than all spans. A row with a negative label does not count.

  Its metrics are F1 and exact match, also of questions with and without an answer, and, next to a
  teacher, the fraction of equal spans. They compare positions: F1 is 2 shared tokens / tokens of
  both spans. With `decode` they compare words as SQuAD's scripts do: in lower case, without
  punctuation and articles, so that the same words elsewhere are right, too. Where a logit inside is
  NaN, F1 and exact match are NaN.

  Args:
    start, end: names of both networks' outputs with the logits, and of the batch's entries with the
      labels.
    inside: the batch's bool entry [B, L] with the tokens that may be in an answer; None: all, and
      every question has an answer.
    max_length: tokens of the longest answer that is predicted.
    ignore_label: a further number that is no label.
    tokens: the batch's entry with token ids [B, L], for `decode`.
    decode: maps the ids of an answer to text; None: positions are compared, and reports have no
      examples.

  Raises:
    ValueError: `max_length` below 1. When it is measured: labels that are no positions, start after
      end, or a label outside of `inside`, such as one on padding.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.spans()
  >>> outputs = {"start": jnp.array([[0.0, 3.0, 1.0]]), "end": jnp.array([[4.0, 0.0, 2.0]])}
  >>> batch = {"start": jnp.array([1]), "end": jnp.array([1])}
  >>> scores = task.compute(task.statistics(outputs, batch, None))  # predicted: 1 to 2
  >>> scores["exact"], round(scores["f1"], 4)
  (0.0, 0.6667)
  """
  check_integer("max_length", max_length, 1)
  check_ignore_label(ignore_label)
  options = _Options(start, end, inside, max_length, ignore_label, tokens, decode)
  return Task(
    metrics=_METRICS,
    statistics=functools.partial(_statistics, options),
    compute=_compute,
    label_classes=lambda outputs: {
      name: outputs_of(outputs, name, "student").shape[-1] for name in (start, end)
    },
    ignore_label=ignore_label,
    predict=functools.partial(_predict, options),
    evaluate_predictions=None if decode is None else functools.partial(_text_scores, options),
    references=() if decode is None else (tokens,),
    figures=None if decode is None else functools.partial(_figures, options),
    figure_references=("id",),
    scores_parts=True,
  )


class _Options(NamedTuple):
  """The arguments of `spans`."""

  start: str
  end: str
  inside: str | None
  max_length: int
  ignore_label: int | None
  tokens: str
  decode: Decode | None

  def predicted(self, outputs: Outputs, batch: Batch, side: str) -> tuple[Spans, jax.Array]:
    """Returns a network's spans, and bool [B], whether a logit that may be in one is NaN."""
    start, end = (outputs_of(outputs, name, side) for name in (self.start, self.end))
    if start.ndim != 2 or start.shape != end.shape:
      raise ValueError(
        f"{self.start!r}, {self.end!r}: expected logits [rows, tokens] of the {side}, got "
        f"{start.shape} and {end.shape}: split an output [rows, tokens, 2] into two"
      )
    start, end = (x.astype(reduce.common_dtype(x.dtype, jnp.float32)) for x in (start, end))
    inside = self.tokens_inside(batch, start.shape)
    is_nan = jnp.isnan(start) | jnp.isnan(end)
    if inside is not None:
      is_nan &= inside | (jnp.arange(start.shape[1]) == NO_ANSWER)
    return best_spans(start, end, inside, self.max_length), is_nan.any(-1)

  def tokens_inside(self, batch: Batch, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns the tokens that may be in an answer, bool [B, L]; None: all."""
    if self.inside is None:
      return None
    inside = batch_entry(batch, self.inside)
    if inside.dtype != jnp.bool_ or inside.shape != shape:
      raise ValueError(
        f"{self.inside}: expected bool {shape}, one for each logit, got {inside.dtype} "
        f"{inside.shape}: write `mask > 0` for integers"
      )
    return inside

  def true(self, batch: Batch, shape: tuple[int, ...]) -> tuple[Spans, jax.Array, jax.Array]:
    """Returns the labels' spans, and bool [B]: which rows have one, and which have none that is
    valid.
    """
    where = batch.get("where")
    sides = [
      class_labels(
        batch_entry(batch, name),
        shape,
        where=where,
        entry=name,
        ignore_label=self.ignore_label,
      )
      for name in (self.start, self.end)
    ]
    start, end = (side.number.astype(jnp.int32) for side in sides)
    labeled = sides[0].labeled & sides[1].labeled
    if where is not None:
      labeled &= where
    inside = self.tokens_inside(batch, shape)
    is_none = jnp.zeros(len(start), bool)
    is_valid = ~sides[0].outside & ~sides[1].outside & (start <= end)
    if inside is not None:
      is_none = (start == NO_ANSWER) & (end == NO_ANSWER) & ~inside[:, NO_ANSWER]
      ends = [jnp.take_along_axis(inside, x[:, None], 1)[:, 0] for x in (start, end)]
      is_valid &= is_none | (ends[0] & ends[1])
    return Spans(start, end, is_none), labeled & is_valid, labeled & ~is_valid


def _statistics(
  options: _Options, outputs: Outputs, batch: Batch, teacher: Outputs | None
) -> dict[str, Any]:
  predicted, is_nan = options.predicted(outputs, batch, "student")
  true, labeled, invalid = options.true(batch, outputs[options.start].shape)
  exact = (predicted.start == true.start) & (predicted.end == true.end)
  f1 = jnp.where(is_nan, jnp.nan, overlap_f1(predicted, true))
  statistics = {
    OUTSIDE: count_outside(invalid),
    "f1": reduce.total(f1, labeled),
    "exact": reduce.total(jnp.where(is_nan, jnp.nan, exact.astype(f1.dtype)), labeled),
    "answerable_f1": reduce.total(f1, labeled & ~true.is_none),
    "no_answer": reduce.total(f1, labeled & true.is_none),
  }
  if teacher is not None:
    shapes = [jnp.shape(outputs_of(x, options.start, "teacher")) for x in (outputs, teacher)]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f"teacher {options.start!r}: expected the student's shape {shapes[0]}, got {shapes[1]}: "
        "both networks need the same tokens"
      )
    other, _ = options.predicted(teacher, batch, "teacher")
    same = (predicted.start == other.start) & (predicted.end == other.end)
    statistics["agreement"] = reduce.total(same, batch.get("where"))
  return statistics


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  invalid = int(statistics[OUTSIDE])
  if invalid:
    raise ValueError(
      f"label: expected positions of tokens of the passage, start <= end, got {invalid} other "
      "pairs: label answers that are cut off 0 and 0 (no answer), or -1 (not counted)"
    )
  return means(statistics)


def _predict(options: _Options, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns predicted and true spans, -1 where there is no answer, and the F1 of their positions,
  NaN without a label.
  """
  predicted, is_nan = options.predicted(outputs, batch, "student")
  true, labeled, _ = options.true(batch, outputs[options.start].shape)
  f1 = jnp.where(labeled & ~is_nan, overlap_f1(predicted, true), jnp.nan)
  rows = {"f1": f1, "labeled": labeled}
  for prefix, one in (("", predicted), ("true_", true)):
    rows[f"{prefix}start"] = jnp.where(one.is_none, -1, one.start)
    rows[f"{prefix}end"] = jnp.where(one.is_none, -1, one.end)
  return rows


def _text_scores(
  options: _Options, predictions: Mapping[str, Any], references: Mapping[str, Any]
) -> dict[str, float]:
  assert options.decode is not None
  labeled = predictions["labeled"]
  rows = {name: np.asarray(x)[labeled] for name, x in predictions.items()}
  if not len(rows["f1"]):
    return {}
  ids = np.asarray(references[options.tokens])[labeled]
  texts = [answers(options.decode, ids, rows, prefix) for prefix in ("", "true_")]
  exact, f1 = np.array([text_scores(*pair) for pair in zip(*texts)]).T
  is_nan = np.isnan(rows["f1"])
  exact[is_nan] = f1[is_nan] = np.nan
  has_answer = rows["true_start"] >= 0
  parts = {
    "f1": f1,
    "exact": exact,
    "answerable_f1": f1[has_answer],
    "no_answer": f1[~has_answer],
  }
  return {name: float(x.mean()) for name, x in parts.items() if len(x)}


def _figures(
  options: _Options,
  entries: Sequence[Any],
  references: Mapping[str, Any],
  class_names: Sequence[str],
) -> Sequence[Any]:
  from distill_jax.tasks._class_figures import span_figures  # matplotlib: reports alone need it

  del class_names
  assert options.decode is not None
  return span_figures(entries, references, tokens=options.tokens, decode=options.decode)
