"""Scores a teacher's sequences, for functions that choose among them.

A score is a pure function of `Candidates` that returns floats [N, K]; what it returns for sequences
that are not usable is not read.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from distill_jax.cache.sequence_level.candidates import Candidates
from distill_jax.data.text import pair_rows
from distill_jax.errors import check_integer, naming_extras

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

  def score(candidates: Candidates) -> np.ndarray:
    return _reference_scores(candidates, function, decode)

  return score


def sentence_bleu(decode: Decode | None = None) -> Score:
  """Computes the BLEU of each sequence, 0 to 100, by sacrebleu.

  It is `sacrebleu.sentence_bleu(use_effective_order=True)`, whose precisions without a match are
  smoothed exponentially (Chen & Cherry 2014, method 3). What `decode` returns is split into words
  by its tokenizer '13a'; without `decode`, tokens are the words.

  Args:
    decode: as for `reference_score`.

  Raises:
    ModuleNotFoundError: sacrebleu, of the extra 'translation', is not installed.

  >>> from distill_jax.cache.sequence_level import Candidates, sentence_bleu
  >>> tokens = np.array([[[5, 6, 7, 8, 0], [5, 6, 8, 9, 0]]])
  >>> lengths = np.array([[4, 4]])
  >>> reference = {"label": np.array([[5, 6, 7, 8, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> sentence_bleu()(rows).round(1).tolist()
  [[100.0, 35.4]]
  """
  _import("sacrebleu")  # A missing package raises before anything is decoded.

  def score(candidates: Candidates) -> np.ndarray:
    tokenize = "none" if decode is None else "13a"
    metric = _import("sacrebleu").BLEU(tokenize=tokenize, effective_order=True)

    def bleu(sequence: str, reference: str) -> float:
      return metric.sentence_score(sequence, [reference]).score

    return _reference_scores(candidates, bleu, decode)

  return score


def word_error_rate(decode: Decode | None = None) -> Score:
  """Computes the word error rate of each sequence, from 0, by jiwer; of tokens that of tokens.

  Distil-Whisper compares normalized texts: normalize in `decode`, which is applied to both sides.

  Args:
    decode: as for `reference_score`.

  Raises:
    ModuleNotFoundError: jiwer, of the extra 'speech', is not installed.

  >>> from distill_jax.cache.sequence_level import Candidates, word_error_rate
  >>> tokens = np.array([[[5, 6, 7, 8, 0], [5, 6, 8, 9, 0]]])
  >>> lengths = np.array([[4, 4]])
  >>> reference = {"label": np.array([[5, 6, 7, 8, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> word_error_rate()(rows).tolist()
  [[0.0, 0.5]]
  """
  _import("jiwer")

  def score(candidates: Candidates) -> np.ndarray:
    jiwer = _import("jiwer")
    return _reference_scores(candidates, lambda text, truth: jiwer.wer(truth, text), decode)

  return score


def backward_cross_entropy(
  log_probs: Callable[[dict[str, np.ndarray]], Any],
  *,
  start_token: int,
  end_token: int,
  batch_size: int = 64,
) -> Score:
  """Computes how badly a model of the other direction predicts the source: -log p / tokens, nats.

  Bergamot's pipeline scores its pseudo labels by it and drops the worst 5 %: `without_worst`.

  Args:
    log_probs: `batch -> float [B, T]`, the log-probabilities of `batch['label']` under a model that
      reads the sequence as 'source' and predicts the source, such as `sequence_log_probs` of
      `models.decoding` of its outputs, under jit. What it returns where the label is negative is
      not read. All batches have one shape.
    start_token: the backward model's first decoder input.
    end_token: token that ends its targets; and its sources, if those of the teacher end with the
      teacher's `end_token`.
    batch_size: rows of a batch.

  Returns:
    The score. The backward model must have the vocabulary of the sequences for its sources, and
    that of the teacher's sources for its targets.

  >>> from distill_jax.cache.sequence_level import Candidates, backward_cross_entropy
  >>> tokens = np.array([[[5, 6, 0], [7, 0, 0]]])
  >>> lengths = np.array([[2, 1]])
  >>> source = {"source": np.array([[8, 9]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, source, 0)
  >>> def log_probs(batch):  # as a model that predicts 8 and 9 from 5, and nothing from 7
  ...   return np.where(batch["source"][:, :1] == 5, -0.1, -5.0) * np.ones(batch["label"].shape)
  >>> backward_cross_entropy(log_probs, start_token=1, end_token=0)(rows)
  array([[0.1, 5. ]])
  """
  check_integer("batch_size", batch_size, 1)

  def score(candidates: Candidates) -> np.ndarray:
    positions = np.argwhere(candidates.usable)
    values = np.full(candidates.usable.shape, np.nan)
    if not len(positions):
      return values
    texts = [candidates.source(row) for row, _ in positions.tolist()]
    has_end = all(tokens[-1:] == [candidates.end_token] for tokens in texts)
    rows = pair_rows(
      [candidates.sequence(row, number) for row, number in positions.tolist()],
      list(map(candidates.without_end, texts)),
      source_length=candidates.tokens.shape[-1] + has_end,
      target_length=candidates.arrays["source"].shape[1] + 1,
      start=start_token,
      end=end_token,
      source_end=end_token if has_end else None,
    )
    sums = np.zeros(len(positions))
    for first in range(0, len(positions), batch_size):
      at = np.minimum(np.arange(first, first + batch_size), len(positions) - 1)
      batch = {name: x[at] for name, x in rows.items()}
      part = np.where(batch["label"] >= 0, np.asarray(log_probs(batch), np.float64), 0).sum(1)
      sums[first : first + batch_size] = part[: len(positions) - first]
    values[tuple(positions.T)] = -sums / (rows["label"] >= 0).sum(1)
    return values

  return score


def _reference_scores(
  candidates: Candidates, function: Callable[[str, str], float], decode: Decode | None
) -> np.ndarray:
  decode = decode or list
  values = np.full(candidates.usable.shape, np.nan)
  for row in np.flatnonzero(candidates.usable.any(1)).tolist():
    reference = _text(decode(candidates.reference(row)))
    for number in np.flatnonzero(candidates.usable[row]).tolist():
      sequence = _text(decode(candidates.sequence(row, number)))
      values[row, number] = function(sequence, reference)
  return values


def _text(decoded: str | Iterable[Any]) -> str:
  return decoded if isinstance(decoded, str) else " ".join(map(str, decoded))


def _import(package: str) -> Any:
  with naming_extras():
    return importlib.import_module(package)
