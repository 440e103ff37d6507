"""Counts the errors of texts by jiwer, one pair of texts at a time."""

import functools
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill_jax.errors import naming_extras

Normalizer = Callable[[str], str]
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc", "'"))


def normalize_transcript(text: str) -> str:
  """Returns a text in lower case, without punctuation and symbols, with single spaces.

  An apostrophe between letters or digits stays ("don't"), however it is written: ' or U+2018,
  U+2019, U+02BC. Elsewhere it is a quotation mark or stands for letters that are left out, and
  becomes a space, as other punctuation and symbols do, those of numbers too ('3.14'). What is
  invisible (a soft hyphen, a control character, the selector of an emoji) vanishes. Letters and
  digits are those of Unicode's NFKC ('ﬁ' becomes 'fi').

  >>> normalize_transcript("  Don’t press 1,  or ＃ !")
  "don't press 1 or"
  >>> normalize_transcript("‘Rock 'n' roll’")
  'rock n roll'
  """
  visible = "".join(c for c in text.translate(_APOSTROPHES) if not _is_invisible(c))
  # Symbols first: NFKC makes marks of some, such as accents that stand alone.
  visible = "".join(c if _is_kept(c, True) else " " for c in visible)
  text = unicodedata.normalize("NFKC", visible).lower()
  # Letters with their marks, and numbers; the edges are as spaces.
  is_word = [unicodedata.category(c)[0] in "LMN" for c in f" {text} "]
  kinds = zip(text, is_word, is_word[2:])
  kept = (c if _is_kept(c, before and behind) else " " for c, before, behind in kinds)
  return " ".join("".join(kept).split())


def _is_invisible(character: str) -> bool:
  """Returns whether a character is a format or control one, a variation selector or a keycap."""
  category = unicodedata.category(character)
  is_control = category == "Cc" and not character.isspace()
  is_selector = category == "Mn" and "VARIATION SELECTOR" in unicodedata.name(character, "")
  return category in ("Cf", "Me") or is_control or is_selector


def _is_kept(character: str, is_inside: bool) -> bool:
  """Returns whether a normalized text has this character, which may be inside of a word."""
  if character == "'":
    return is_inside
  return unicodedata.category(character)[0] not in "PS"


class ErrorCounter:
  """Counts errors of pairs of texts, equal pairs once: intervals need them again and again.

  The rates of a corpus are those of jiwer: they follow from sums over texts.
  """

  def __init__(self, normalizer: Normalizer | None):
    """Args: `normalizer`, applied to both texts; None: texts stay as they are."""
    self.normalize: Normalizer = normalizer or str
    self._count = functools.lru_cache(maxsize=2**17)(self._count_pair)

  def counts(self, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Returns, for each text, errors and number of words, then those of characters: int [N, 4]."""
    return np.array([self._count(*pair) for pair in zip(texts, references)], int).reshape(-1, 4)

  def rates(self, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Returns the error rates of words and of characters of each text, float [N, 2]."""
    counts = self.counts(texts, references)
    return counts[:, ::2] / np.maximum(counts[:, 1::2], 1)

  def scores(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns 'wer', 'cer' and 'exact' of a corpus; {} of none."""
    if not texts:
      return {}
    counts = self.counts(texts, references)
    word_errors, words, errors, characters = counts.sum(0).tolist()
    # As in jiwer: where all references are empty, the number of insertions.
    return {
      "wer": word_errors / max(words, 1),
      "cer": errors / max(characters, 1),
      "exact": float((counts[:, 2] == 0).mean()),
    }

  def _count_pair(self, text: str, reference: str) -> tuple[int, int, int, int]:
    with naming_extras():
      import jiwer  # an extra, which text alone needs
    pair = self.normalize(reference), self.normalize(text)
    return *_errors(jiwer.process_words(*pair)), *_errors(jiwer.process_characters(*pair))


def _errors(result: Any) -> tuple[int, int]:
  """Returns the number of errors, and of words or characters of the reference."""
  changed = result.substitutions + result.deletions
  return changed + result.insertions, changed + result.hits
