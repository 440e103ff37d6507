"""Predictions of sequences: what a network generated and what it should have, and their texts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import suggest
from distill_jax.objectives.calls import batch_entry
from distill_jax.tasks.language_modeling import language_modeling, vocabulary_size
from distill_jax.types import SAMPLE, Batch, Metric, Outputs, Task

Decode = Callable[[np.ndarray], str | Sequence[str]]


def sequence_task(metrics: Sequence[Metric], decides: str, memory: int, **fields: Any) -> Task:
  """Returns the task of generated sequences, without the scores of their text.

  Args:
    metrics: those of the text, which come first.
    decides: the metric that chooses the weights; "": the first one.
    memory: bytes that one network's logits may take at once.
    **fields: further ones of the `Task`.

  Raises:
    ValueError: there is no metric of the name `decides`.
  """
  tokens = language_modeling(memory=memory)
  by_name = {metric.name: metric for metric in tokens.metrics}
  accuracy = Metric("accuracy", "token accuracy", "%", "max", ".2%")
  perplexity = by_name["perplexity"]
  others = [by_name[name] for name in ("nll", "agreement", "teacher_kl", "ece")]
  hidden = Metric("perplexity", "perplexity", "", perplexity.better, perplexity.format, detail=2)
  every = (*metrics, others[0], accuracy, hidden, *others[1:])
  names = [metric.name for metric in every]
  if decides and decides not in names:
    raise ValueError(
      f"decides: expected a metric of the task, got {decides!r}{suggest(decides, names)}"
    )

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    # Texts compare over vocabularies; distributions over tokens do not.
    same = teacher is not None and vocabulary_size(teacher) == vocabulary_size(outputs)
    return tokens.statistics(outputs, batch, teacher if same else None)

  return tokens._replace(
    metrics=every,
    statistics=statistics,
    predict=predict,
    generates=True,
    decides=decides,
    scores_parts=True,
    **fields,
  )


def predict(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns generated tokens [B, L] and labels [B, T], int32, -1 where there is none."""
  tokens, lengths = outputs[SAMPLE]
  inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
  # Cast first: in an unsigned dtype -1 is its largest number.
  label = jnp.maximum(batch_entry(batch, "label").astype(jnp.int32), -1)
  return {"tokens": jnp.where(inside, tokens, -1).astype(jnp.int32), "label": label}


def labeled_rows(predictions: Mapping[str, Any]) -> np.ndarray:
  """Returns which examples have a label, bool [N]: the end token alone is one, of an empty text."""
  return np.any(np.asarray(predictions["label"]) >= 0, axis=1)


def check_ends(label: np.ndarray, end_token: int) -> None:
  """Checks that labels end with the end token.

  Args:
    label: int [N, T], -1 where there is none.
    end_token: the token.

  Raises:
    ValueError: none of the labels has it; some may be cut off.
  """
  if len(label) and not (label == end_token).any():
    raise ValueError(
      f"end_token: expected labels that end with {end_token}, got none in {len(label)} examples: "
      "name the token that ends targets, and label it"
    )


def cut(rows: np.ndarray, end_token: int | None) -> list[np.ndarray]:
  """Returns the tokens of each row up to the first end token, without it and without padding.

  Args:
    rows: int [N, L], negative ones are padding.
    end_token: None: there is none.
  """
  sequences = [row[row >= 0] for row in np.asarray(rows)]
  if end_token is None:
    return sequences
  # A token behind the last one makes argmax find the end of a row that has none.
  stops = [np.append(row == end_token, True).argmax() for row in sequences]
  return [row[:stop] for row, stop in zip(sequences, stops)]


class Texts:
  """Decodes sequences to text; equal ones once, since intervals need them again and again."""

  def __init__(self, decode: Decode, end_token: int | None):
    """Args: as those of `tasks.translation`; `end_token` None: nothing is cut off."""
    self._end_token = end_token

    @functools.lru_cache(maxsize=2**17)
    def decode_bytes(ids: bytes) -> str:
      text = decode(np.frombuffer(ids, np.int32))
      return text if isinstance(text, str) else " ".join(map(str, text))

    self._decode = decode_bytes

  def __call__(self, rows: np.ndarray) -> list[str]:
    """Returns the text of each row of tokens int [N, L], negative ones left out."""
    return [self._decode(ids.astype(np.int32).tobytes()) for ids in cut(rows, self._end_token)]
