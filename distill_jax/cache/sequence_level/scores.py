"""Scores a teacher's sequences, for functions that choose among them.

A score is a pure function of `Candidates` that returns floats [N, K]; what it returns for sequences
that are not usable is not read.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from distill_jax.cache.sequence_level.candidates import Candidates
from distill_jax.errors import naming_extras

Score = Callable[[Candidates], np.ndarray]
Decode = Callable[[list[int]], str | Iterable[Any]]
"""Returns the text of tokens, or symbols such as phones, which are joined by spaces."""


def reference_score(function: Callable[[str, str], float], decode: Decode | None = None) -> Score:
  """Scores each usable sequence against the reference of its row, which is the source's 'label'.

  Args:
    function: `(sequence, reference) -> float` of two texts.
    decode: tokens -> text, such as `SequenceTokenizer.decode`, or symbols; None: the numbers of the
      tokens, separated by spaces.

  Raises:
    ValueError: when called, a row with a usable sequence has no reference; the message names it.

  >>> from distill_jax.cache.sequence_level import Candidates, reference_score
  >>> tokens = np.array([[[5, 6, 7, 0]]])
  >>> lengths = np.array([[3]])
  >>> reference = {"label": np.array([[5, 6, 8, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> reference_score(lambda sequence, reference: len(sequence) - len(reference))(rows)
  array([[0.]])
  """
  decode = decode or list

  def score(candidates: Candidates) -> np.ndarray:
    values = np.full(candidates.usable.shape, np.nan)
    for row in np.flatnonzero(candidates.usable.any(1)).tolist():
      reference = _text(decode(candidates.reference(row)))
      for number in np.flatnonzero(candidates.usable[row]).tolist():
        sequence = _text(decode(candidates.sequence(row, number)))
        values[row, number] = function(sequence, reference)
    return values

  return score


def sentence_bleu(decode: Decode | None = None) -> Score:
  """Computes the BLEU of each sequence, 0 to 100, by sacrebleu.

  It is `sacrebleu.sentence_bleu(use_effective_order=True)`, whose precisions without a match are
  smoothed exponentially (Chen & Cherry 2014, method 3). What `decode` returns is split into words
  by its tokenizer '13a'; without `decode`, tokens are the words.

  Args:
    decode: as for `reference_score`.

  Raises:
    ModuleNotFoundError: sacrebleu is not installed.

  >>> from distill_jax.cache.sequence_level import Candidates, sentence_bleu
  >>> tokens = np.array([[[5, 6, 7, 8, 0], [5, 6, 8, 9, 0]]])
  >>> lengths = np.array([[4, 4]])
  >>> reference = {"label": np.array([[5, 6, 7, 8, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> sentence_bleu()(rows).round(1).tolist()
  [[100.0, 35.4]]
  """
  with naming_extras():
    from sacrebleu.metrics import BLEU
  metric = BLEU(tokenize="none" if decode is None else "13a", effective_order=True)

  def bleu(sequence: str, reference: str) -> float:
    return metric.sentence_score(sequence, [reference]).score

  return reference_score(bleu, decode)


def word_error_rate(decode: Decode | None = None) -> Score:
  """Computes the word error rate of each sequence, from 0, by jiwer; of tokens that of tokens.

  Distil-Whisper compares normalized texts: normalize in `decode`, which is applied to both sides.

  Args:
    decode: as for `reference_score`.

  Raises:
    ModuleNotFoundError: jiwer is not installed.

  >>> from distill_jax.cache.sequence_level import Candidates, word_error_rate
  >>> tokens = np.array([[[5, 6, 7, 8, 0], [5, 6, 8, 9, 0]]])
  >>> lengths = np.array([[4, 4]])
  >>> reference = {"label": np.array([[5, 6, 7, 8, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> word_error_rate()(rows).tolist()
  [[0.0, 0.5]]
  """
  with naming_extras():
    import jiwer

  def error_rate(sequence: str, reference: str) -> float:
    return jiwer.wer(reference, sequence)

  return reference_score(error_rate, decode)


def _text(decoded: str | Iterable[Any]) -> str:
  return decoded if isinstance(decoded, str) else " ".join(map(str, decoded))
