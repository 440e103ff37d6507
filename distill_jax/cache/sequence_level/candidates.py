"""Holds the sequences that a teacher generated for each row, and checks what a sampler returns."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

COLUMNS = ("tokens", "lengths", "scores")


class Candidates(NamedTuple):
  """The sequences of a teacher for N rows, K for each, best first; what `keep` functions read.

  Attributes:
    ids: of the rows, int32 [N].
    tokens: int32 [N, K, L], without start token; from its length on, the end token.
    lengths: number of tokens of each, without the end token, int32 [N, K].
    scores: of the sampler, float32 [N, K]; 0 of one that returns none.
    usable: bool [N, K]: the sequences that may still be kept. Not usable are empty sequences (those
      of CTC are), those that did not end within L tokens, that begin with the start token, or that
      do not fit the targets of the source, and those that earlier functions left out.
    arrays: the source's entries, [N, ...] in the same order.
    end_token: token that ends a sequence; the blank of CTC, which pads it.
    start_token: token that precedes a target, which is none of its tokens; -1: unknown, or none.
    has_end: whether targets end with the end token; those of CTC do not.

  >>> from distill_jax.cache.sequence_level import Candidates
  >>> tokens = np.array([[[5, 0], [6, 0]]], np.int32)
  >>> ones = np.ones((1, 2), np.int32)
  >>> rows = Candidates(np.array([7]), tokens, ones, np.zeros((1, 2)), ones == 1, {}, end_token=0)
  >>> rows.sequence(0, 1)
  [6]
  """

  ids: np.ndarray
  tokens: np.ndarray
  lengths: np.ndarray
  scores: np.ndarray
  usable: np.ndarray
  arrays: Mapping[str, np.ndarray]
  end_token: int
  start_token: int = -1
  has_end: bool = True

  def sequence(self, row: int, number: int) -> list[int]:
    """Returns the tokens of one of a row's sequences, without the end token."""
    return self.tokens[row, number, : self.lengths[row, number]].tolist()

  def reference(self, row: int) -> list[int]:
    """Returns the tokens of a row's 'label', without the end token.

    Raises:
      ValueError: there is no label; the message names the example.
    """
    label = self.arrays.get("label")
    if label is not None and label.ndim != 2:
      raise ValueError(f"label: expected tokens [N, T], got {label.dtype} {list(label.shape)}")
    tokens = [] if label is None else label[row][label[row] >= 0].tolist()
    if not self.has_end and tokens:  # A row of blanks is an empty reference.
      return [token for token in tokens if token != self.end_token]
    if not tokens:
      raise ValueError(
        f"label: expected a reference in every row, got none in example id {self.ids[row]}: give "
        "keep functions that need none, or a source of the labeled rows only"
      )
    return self.without_end(tokens)

  def source(self, row: int) -> list[int]:
    """Returns the tokens of a row's 'source', without padding."""
    tokens = self.arrays["source"][row]
    segments = self.arrays.get("source_segments")
    return tokens.tolist() if segments is None else tokens[segments[row] >= 0].tolist()

  def without_end(self, tokens: list[int]) -> list[int]:
    """Returns tokens without the end token, if it is the last one."""
    return tokens[:-1] if tokens[-1:] == [self.end_token] else tokens


Keep = Callable[[Candidates], np.ndarray]
"""Returns which sequences of each row may be kept, bool [N, K]."""


class TokenLimits(NamedTuple):
  """What tokens a sampler may return.

  Attributes:
    start_token: token that precedes each target; -1: none.
    end_token: token that ends each target, or the blank of CTC; no sequence holds it.
    vocab_size: number of tokens; None: unknown.
    name: of the source whose classes they are, for errors.
    has_end: whether targets end with the end token.
  """

  start_token: int
  end_token: int
  vocab_size: int | None
  name: str
  has_end: bool = True


def to_columns(result: Any, ids: np.ndarray, limits: TokenLimits) -> dict[str, np.ndarray]:
  """Returns what a sampler returned for a batch as columns [B, K, ...].

  Args:
    result: `(tokens [B, L], lengths [B])`, or `(tokens [B, K, L], lengths [B, K], scores [B, K])`;
      a score of -inf is no sequence.
    ids: of the batch's rows, [B].
    limits: what tokens there may be.

  Raises:
    ValueError: it has another form, or a sequence is none; the message names the example.
  """
  if not isinstance(result, tuple | list) or len(result) not in (2, 3):
    raise ValueError(
      f"sampler: expected (tokens, lengths), or (tokens, lengths, scores) of a beam, got "
      f"{type(result).__name__}{f' of {len(result)}' if isinstance(result, tuple | list) else ''}: "
      "return arrays as models.decoding does"
    )
  arrays = dict(zip(COLUMNS, map(np.asarray, jax.device_get(list(result)))))
  _check_shapes(arrays, len(ids))
  if len(result) == 2:
    arrays = {name: values[:, None] for name, values in arrays.items()}
    arrays["scores"] = np.zeros(arrays["lengths"].shape, np.float32)
  tokens, lengths, scores = (arrays[name] for name in COLUMNS)
  _check(np.isnan(scores), "scores: expected numbers, got NaN", ids)
  _check(
    np.pad(scores[:, 1:] > scores[:, :-1], ((0, 0), (1, 0))),
    "scores: expected the best sequence first, got a better one later",
    ids,
  )
  lengths = np.where(np.isneginf(scores), 0, lengths)
  longest = tokens.shape[-1]
  _check(
    (lengths < 0) | (lengths > longest),
    f"lengths: expected 0 to {longest}, the tokens' last axis, got another",
    ids,
  )
  inside = np.arange(longest) < lengths[..., None]
  _check_tokens(tokens, inside, ids, limits)
  return {
    "tokens": np.where(inside, tokens, limits.end_token).astype(np.int32),
    "lengths": lengths.astype(np.int32),
    "scores": scores.astype(np.float32),
  }


def _check_shapes(arrays: Mapping[str, np.ndarray], rows: int) -> None:
  """Raises ValueError for other shapes or dtypes than those of the protocol."""
  axes = "BL" if len(arrays) == 2 else "BKL"
  shape = arrays["tokens"].shape
  if len(shape) != len(axes) or shape[0] != rows or 0 in shape:
    raise ValueError(
      f"tokens: expected [{', '.join(axes)}] of a sampler with B = {rows}, got {list(shape)}: "
      "return one row for each of the batch"
    )
  for name, values in arrays.items():
    kind, word = ("f", "floats") if name == "scores" else ("iu", "integers")
    if values.dtype.kind not in kind or (name != "tokens" and values.shape != shape[:-1]):
      expected = shape if name == "tokens" else shape[:-1]
      raise ValueError(
        f"{name}: expected {word} {list(expected)} of the sampler, got {values.dtype} "
        f"{list(values.shape)}"
      )


def _check_tokens(
  tokens: np.ndarray, inside: np.ndarray, ids: np.ndarray, limits: TokenLimits
) -> None:
  """Raises ValueError for tokens that no sequence may hold."""
  _, end, size, name, has_end = limits
  special = "end_token" if has_end else "blank"
  _check(
    np.any(inside & (tokens == end), axis=-1),
    f"lengths: expected sequences without {special} {end}, got it before a sequence's end: do not "
    "count it",
    ids,
  )
  largest = np.iinfo(np.int32).max if size is None else size - 1
  outside = (tokens < 0) | (tokens > largest)
  _check(
    np.any(inside & outside, axis=-1),
    f"tokens: expected 0 to {largest}, the classes of {name}, got another: the teacher must have "
    "the vocabulary of the source and of its students",
    ids,
  )


def _check(wrong: np.ndarray, text: str, ids: np.ndarray) -> None:
  """Raises ValueError with the first row in which a sequence [B, K] is wrong."""
  if wrong.any():
    row, number = np.argwhere(wrong)[0]
    which = f", sequence {number}" if wrong.shape[1] > 1 else ""
    raise ValueError(f"{text} (example id {ids[row]}{which})")
