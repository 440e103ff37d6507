"""Sequences of symbols from a source, such as the phones of a word: exact match and errors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import naming_extras
from distill_jax.tasks._sequences import (
  Decode,
  Texts,
  check_ends,
  cut,
  labeled_rows,
  sequence_task,
)
from distill_jax.types import Metric, Task


def transduction(
  decode: Decode | None = None,
  *,
  end_token: int,
  decode_source: Decode | None = None,
  symbol: str = "token",
  decides: str = "",
  memory: int = 2**26,
) -> Task:
  """Returns the task of sequences of symbols that a network generates from a source: labels int
  [B, T] are the target with its end token, negative behind it.

  Its metrics are 'exact', the fraction of sequences without any error, and 'error_rate': the
  insertions, deletions and substitutions of all sequences (by rapidfuzz, in the extra
  'translation'), over the symbols of all targets; may exceed 1. Further ones, rows that do not
  count, and each network's `Model.sample` are as for `tasks.translation`.

  Args:
    decode: maps symbols, int32 [n], to text, or to names that are joined by spaces; None: a report
      shows no examples.
    end_token: the token that ends targets; neither it nor what follows it counts.
    decode_source: the same for the batch's 'source' [B, S] where 'source_segments', if there are
      any, are not negative; None: `decode`, up to `end_token`.
    symbol: what a symbol is, for titles: 'phone'.
    decides: the metric that chooses the weights; 'nll' spares generating while training. "":
      'exact'.
    memory: bytes that one network's logits may take at once.

  Raises:
    ValueError: no metric of the name `decides`. When it is measured: a Model without `sample`, no
      label with the end token.
    ModuleNotFoundError: when it is measured, rapidfuzz is not installed.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks, types
  >>> task = tasks.transduction(end_token=0, symbol="phone")
  >>> outputs = {types.SAMPLE: (jnp.array([[7, 5, 6], [5, 0, 0]]), jnp.array([3, 1]))}
  >>> predictions = task.predict(outputs, {"label": jnp.array([[7, 6, 0], [5, 0, -1]])})
  >>> task.evaluate_predictions(predictions, {})  # One phone too many, to three.
  {'exact': 0.5, 'error_rate': 0.3333333333333333}
  """
  metrics = (
    Metric("exact", "exact match", "%", "max", ".2%", detail=0),
    Metric("error_rate", f"{symbol} error rate", "%", "min", ".2%", detail=0),
  )
  options = _Options(
    None if decode is None else Texts(decode, end_token),
    None if decode is None else Texts(decode_source or decode, end_token),
    end_token,
    symbol,
  )
  if decode_source is not None:
    options = options._replace(source_texts=Texts(decode_source, None))
  return sequence_task(
    metrics,
    decides,
    memory,
    evaluate_predictions=options.evaluate,
    references=(),
    figures=None if decode is None else options.figures,
    figure_references=("source", "source_segments", "id"),
  )


class _Options(NamedTuple):
  """What the functions of `transduction` need."""

  texts: Texts | None
  source_texts: Texts | None
  end_token: int
  symbol: str

  def errors(self, tokens: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns errors and symbols of the target of each row, int [N]."""
    with naming_extras():
      from rapidfuzz.distance import Levenshtein  # an extra, which sequences alone need
    sequences, targets = (cut(rows, self.end_token) for rows in (tokens, label))
    distances = [
      Levenshtein.distance(found.tolist(), target.tolist())
      for found, target in zip(sequences, targets)
    ]
    return np.array(distances, int), np.array([len(target) for target in targets], int)

  def evaluate(
    self, predictions: Mapping[str, Any], references: Mapping[str, Any]
  ) -> dict[str, float]:
    """Returns the scores of the sequences."""
    del references
    labeled = labeled_rows(predictions)
    tokens, label = (np.asarray(predictions[name])[labeled] for name in ("tokens", "label"))
    if not len(label):
      return {}
    check_ends(label, self.end_token)
    errors, symbols = self.errors(tokens, label)
    scores = {"exact": float((errors == 0).mean())}
    # Empty targets alone have no rate.
    return scores | ({"error_rate": float(errors.sum() / symbols.sum())} if symbols.any() else {})

  def figures(
    self, entries: Sequence[Any], references: Mapping[str, Any], class_names: Sequence[str]
  ) -> Sequence[Any]:
    """Returns the examples."""
    from distill_jax.tasks._class_figures import sequence_figures  # matplotlib

    del class_names
    predicted = [entry for entry in entries if "tokens" in (entry.predictions or {})]
    if not predicted:
      return []
    assert self.texts is not None
    label = np.asarray(predicted[0].predictions["label"])

    def rates(rows: np.ndarray) -> np.ndarray:
      errors, symbols = self.errors(rows, label)
      return errors / np.maximum(symbols, 1)

    return sequence_figures(
      predicted,
      references,
      true=self.texts(label),
      texts=self.texts,
      source_texts=self.source_texts,
      scores=rates,
      title=f"{self.symbol} error rate",
      form=".0%",
      sign=-1,
    )
