"""BLEU and chrF by sacrebleu, from statistics of single sentences."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.errors import naming_extras


class Scorer:
  """BLEU and chrF of texts with one reference each.

  sacrebleu's corpus scores follow from sums over sentences, which are counted once per pair of
  texts: a report scores the examples without each of 20 parts.
  """

  def __init__(self, tokenize: str):
    """Args: `tokenize`, of words for BLEU, a name of sacrebleu."""
    self._tokenize = tokenize
    self._statistics = functools.lru_cache(maxsize=2**17)(self._count)

  def scores(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns 'bleu' and 'chrf' of a corpus, 0 to 100; {} of none."""
    if not texts:
      return {}
    pairs = [self._statistics(*pair) for pair in zip(texts, references)]
    sums = [np.sum(side, axis=0).tolist() for side in zip(*pairs)]
    return {name: _score(self._metrics[name], side) for name, side in zip(self._metrics, sums)}

  def sentence_scores(self, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Returns the chrF of each text, 0 to 100; NaN of an empty one that should be empty."""
    pairs = list(zip(texts, references))
    statistics = [self._statistics(*pair)[1] for pair in pairs]
    scores = [_score(self._metrics["chrf"], list(one)) for one in statistics]
    return np.array([score if any(pair) else np.nan for score, pair in zip(scores, pairs)])

  def signatures(self) -> dict[str, str]:
    """Returns sacrebleu's signatures of both scores."""
    for metric in self._metrics.values():
      metric.corpus_score(["a"], [["a"]])  # There is no signature before a score.
    return {name: str(metric.get_signature()) for name, metric in self._metrics.items()}

  @functools.cached_property
  def _metrics(self) -> dict[str, Any]:
    with naming_extras():
      from sacrebleu.metrics import BLEU, CHRF  # an extra, which text alone needs
    return {"bleu": BLEU(tokenize=self._tokenize), "chrf": CHRF()}

  def _count(self, text: str, reference: str) -> list[tuple[float, ...]]:
    """Returns the sentence's summands of both scores."""
    return [
      tuple(metric._extract_corpus_statistics([text], [[reference]])[0])
      for metric in self._metrics.values()
    ]


def _score(metric: Any, statistics: list[float]) -> float:
  return float(metric._aggregate_and_compute([statistics]).score)
