"""Chooses among a teacher's sequences: the functions for `keep=` of `seq_kd`.

Each is a pure function of `Candidates` that returns which sequences of each row may stay, bool
[N, K]. Several are applied in their order.
"""

import math

import numpy as np

from distill_jax.cache.sequence_level.candidates import Candidates, Keep
from distill_jax.cache.sequence_level.scores import Score, sentence_bleu
from distill_jax.errors import check_integer


def nth_best(number: int) -> Keep:
  """Keeps one sequence of a beam by its rank.

  Args:
    number: of the sequence; 0 is the best.

  Raises:
    ValueError: the number is below 0; when called, the beam has fewer sequences.

  >>> from distill_jax.cache.sequence_level import Candidates, nth_best
  >>> ones = np.ones((1, 3), np.int32)
  >>> rows = Candidates(np.array([7]), ones[..., None], ones, -ones, ones > 0, {}, 0)
  >>> nth_best(1)(rows)
  array([[False,  True, False]])
  """
  check_integer("number", number, 0)

  def keep(candidates: Candidates) -> np.ndarray:
    count = candidates.usable.shape[1]
    check_integer("number", number, 0, count - 1)
    return candidates.usable & (np.arange(count) == number)

  return keep


def nearest_to_reference(score: Score | None = None) -> Keep:
  """Keeps the sequence of a beam with the highest score, the first of equal ones.

  With the score against the reference, this is the interpolation of Kim & Rush (2016), section 3.3.

  Args:
    score: `Candidates -> float [N, K]`; None: `sentence_bleu()`.

  >>> from distill_jax.cache.sequence_level import Candidates, nearest_to_reference
  >>> tokens = np.array([[[5, 6, 7, 0], [5, 6, 8, 0]]])
  >>> lengths = np.array([[3, 3]])
  >>> reference = {"label": np.array([[5, 6, 8, 9, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> nearest_to_reference()(rows)
  array([[False,  True]])
  """
  score = sentence_bleu() if score is None else score

  def keep(candidates: Candidates) -> np.ndarray:
    values = np.where(candidates.usable, _values(score, candidates), -math.inf)
    nearest = np.arange(values.shape[1]) == values.argmax(1)[:, None]
    return candidates.usable & nearest

  return keep


def at_least(score: Score, least: float) -> Keep:
  """Keeps sequences whose score is at least a threshold, such as a BLEU of 30.

  Args:
    score: `Candidates -> float [N, K]`.
    least: the threshold.

  >>> from distill_jax.cache.sequence_level import Candidates, at_least
  >>> ones = np.ones((2, 1), np.int32)
  >>> rows = Candidates(np.arange(2), ones[..., None], ones, -ones, ones > 0, {}, 0)
  >>> at_least(lambda candidates: np.array([[20.0], [40.0]]), 30.0)(rows).tolist()
  [[False], [True]]
  """
  _check_threshold("least", least)

  def keep(candidates: Candidates) -> np.ndarray:
    return candidates.usable & (_values(score, candidates) >= least)

  return keep


def below(score: Score, limit: float) -> Keep:
  """Keeps sequences whose score is below a threshold, such as a word error rate of 0.1.

  With `word_error_rate` this is the filter of Distil-Whisper (Gandhi et al. 2023), section 4.

  Args:
    score: `Candidates -> float [N, K]`.
    limit: the threshold.

  >>> from distill_jax.cache.sequence_level import Candidates, below, word_error_rate
  >>> tokens = np.array([[[5, 6, 7, 0]]])
  >>> lengths = np.array([[3]])
  >>> reference = {"label": np.array([[5, 6, 8, 0]])}
  >>> rows = Candidates(np.array([7]), tokens, lengths, -lengths, lengths > 0, reference, 0)
  >>> below(word_error_rate(), 0.5)(rows), below(word_error_rate(), 0.1)(rows)
  (array([[ True]]), array([[False]]))
  """
  _check_threshold("limit", limit)

  def keep(candidates: Candidates) -> np.ndarray:
    return candidates.usable & (_values(score, candidates) < limit)

  return keep


def without_worst(score: Score, fraction: float) -> Keep:
  """Drops the rows whose first usable sequence has the highest scores.

  With `backward_cross_entropy` this is the filter of Bergamot's pseudo labels (Behnke et al. 2021).

  Args:
    score: `Candidates -> float [N, K]`, higher is worse.
    fraction: fraction of the rows that still have a sequence, in [0, 1), which is dropped, rounded
      down; of equal scores the later rows.

  >>> from distill_jax.cache.sequence_level import Candidates, without_worst
  >>> ones = np.ones((4, 1), np.int32)
  >>> rows = Candidates(np.arange(4), ones[..., None], ones, -ones, ones > 0, {}, 0)
  >>> score = lambda candidates: np.array([[3.0], [9.0], [1.0], [2.0]])
  >>> without_worst(score, 0.25)(rows).ravel()
  array([ True, False,  True,  True])
  """
  if not 0 <= fraction < 1:
    raise ValueError(f"fraction: expected a number in [0, 1), got {fraction}")

  def keep(candidates: Candidates) -> np.ndarray:
    values = _values(score, candidates)
    rows = np.flatnonzero(candidates.usable.any(1))
    first = values[rows, candidates.usable[rows].argmax(1)]
    worst = rows[np.argsort(first, kind="stable")][len(rows) - math.floor(fraction * len(rows)) :]
    kept = candidates.usable.copy()
    kept[worst] = False
    return kept

  return keep


def _values(score: Score, candidates: Candidates) -> np.ndarray:
  """Returns the scores of all sequences, those that are not usable NaN.

  Raises:
    ValueError: the function returns another shape, or NaN for a sequence that is usable.
  """
  values = np.asarray(score(candidates), np.float64)
  usable = candidates.usable
  if values.shape != usable.shape:
    raise ValueError(
      f"score: expected floats {list(usable.shape)}, one for each sequence, got "
      f"{list(values.shape)}"
    )
  wrong = usable & np.isnan(values)
  if wrong.any():
    row, number = np.argwhere(wrong)[0]
    raise ValueError(
      f"score: expected a number for each usable sequence, got NaN for example id "
      f"{candidates.ids[row]}, sequence {number}"
    )
  return np.where(usable, values, np.nan)


def _check_threshold(name: str, value: float) -> None:
  if not math.isfinite(value):
    raise ValueError(f"{name}: expected a finite number, got {value}")
