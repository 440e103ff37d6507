"""Spans of tokens: the best one of two rows of logits, and how well it matches another."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NO_ANSWER = 0
"""First and last token of the span that stands for no answer: BERT's [CLS]."""


class Spans(NamedTuple):
  """A span of each row, first and last token.

  Attributes:
    start, end: int32 [B].
    is_none: bool [B], where the span stands for no answer.
  """

  start: jax.Array
  end: jax.Array
  is_none: jax.Array


def best_spans(
  start: jax.Array, end: jax.Array, inside: jax.Array | None, max_length: int
) -> Spans:
  """Returns the span of each row with the highest sum of both logits; of equal ones the first, then
  the shortest.

  Args:
    start, end: logits [B, L].
    inside: bool [B, L], tokens that may begin or end an answer. Where token 0 is none of them, the
      span of token 0 stands for no answer and is chosen where its sum exceeds that of all others.
      None: all tokens.
    max_length: tokens of the longest span.
  """
  length = start.shape[1]
  none = jnp.full(len(start), -jnp.inf, start.dtype)
  if inside is not None:
    none = jnp.where(inside[:, 0], none, start[:, NO_ANSWER] + end[:, NO_ANSWER])
    start, end = (jnp.where(inside, x, -jnp.inf) for x in (start, end))
  sizes = min(max_length, length)
  ends = jnp.pad(end, ((0, 0), (0, sizes)), constant_values=-jnp.inf)
  sums = jnp.stack([start + ends[:, n : n + length] for n in range(sizes)], -1).reshape(
    len(start), -1
  )
  best = sums.argmax(-1).astype(jnp.int32)
  first, size = best // sizes, best % sizes
  if inside is None:
    return Spans(first, first + size, jnp.zeros(len(start), bool))
  # Without any token that may be in an answer there is none.
  is_none = ~inside[:, 0] & ((none > sums.max(-1)) | ~inside.any(-1))
  return Spans(jnp.where(is_none, 0, first), jnp.where(is_none, 0, first + size), is_none)


def overlap_f1(predicted: Spans, true: Spans) -> jax.Array:
  """Returns 2 shared tokens / (tokens of one span + tokens of the other), float32 [B]."""
  shared = jnp.minimum(predicted.end, true.end) - jnp.maximum(predicted.start, true.start) + 1
  sizes = [spans.end - spans.start + 1 for spans in (predicted, true)]
  return 2 * jnp.maximum(shared, 0).astype(jnp.float32) / sum(sizes)


def answers(
  decode: Callable[[np.ndarray], str],
  tokens: np.ndarray,
  predictions: Mapping[str, np.ndarray],
  prefix: str = "",
) -> list[str]:
  """Returns the text of each span; '' for no answer.

  Args:
    decode: maps ids to text.
    tokens: ids, int [N, L].
    predictions: 'start' and 'end', int [N], -1 where there is no answer.
    prefix: of their names: 'true_' for the labels'.
  """
  pairs = zip(tokens, predictions[f"{prefix}start"], predictions[f"{prefix}end"])
  return ["" if first < 0 else decode(ids[first : last + 1]) for ids, first, last in pairs]


def text_scores(predicted: str, true: str) -> tuple[float, float]:
  """Returns exact match and F1 of two answers, as SQuAD's scripts (versions 1.1 and 2.0).

  Words are compared in lower case, without punctuation and articles; F1 is that of the two bags of
  words. No answer is the empty text, and equals itself only.
  """
  words = [_words(text) for text in (predicted, true)]
  exact = float(words[0] == words[1])
  if not all(words):
    return exact, exact
  shared = (Counter(words[0]) & Counter(words[1])).total()
  return exact, 2 * shared / sum(map(len, words))


def _words(text: str) -> list[str]:
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r"\b(a|an|the)\b", " ", text).split()
