"""Turns the log-probabilities of a prompt's tokens into rows of a text.

A causal model's log-probabilities of token t + 1 of a prompt are those that it has at position t of
the row. The prompt of a row is therefore its tokens up to the last position with a label, and that
label: `n + 1` tokens for `n` positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.cache.importing.row_checks import LABELS, TARGETS, row_name
from distill_jax.cache.teacher_inputs import make_teacher_inputs
from distill_jax.errors import join_first

NO_CLASS = -9999.0  # vLLM's -inf, which JSON does not have


class TokenRows:
  """The prompts of a text's rows, and their log-probabilities as rows.

  Args:
    source: has 'tokens' and 'label', integers [N, L] each: the label is the next token.
    top_k: number of tokens at each position.

  Raises:
    ValueError: the source is no text, or top_k is not from 1 to its number of classes.
  """

  def __init__(self, source: Any, top_k: int):
    self._inputs = make_teacher_inputs(source, None)
    self._top_k = top_k
    self._classes = len(self._inputs.source.class_names)
    self._ids = set(self._inputs.source.ids.tolist())
    tokens, label = (self._inputs.shapes.get(name) for name in ("tokens", "label"))
    shapes = [x for x in (tokens, label) if x is not None and x.dtype.kind == "i"]
    if [len(x.shape) for x in shapes] != [2, 2]:
      raise ValueError(
        "source: expected a text with integers [N, L] in 'tokens' and 'label', got "
        f"{sorted(self._inputs.shapes)}: use a source of data.text, for example"
      )
    if not 1 <= top_k <= self._classes:
      raise ValueError(f"top_k: expected 1 to {self._classes}, the vocabulary, got {top_k}")

  @property
  def ids(self) -> list[int]:
    """The ids of the source's rows."""
    return self._inputs.source.ids.tolist()

  def prompt(self, id: int) -> list[int]:
    """Returns the tokens whose log-probabilities the row needs; [] for a row without labels.

    Raises:
      ValueError: there is no such row, or a label is not the next token.
    """
    if id not in self._ids:
      raise ValueError(
        f"{row_name(id, 0)}: expected an id of the source, got another one: pass the source whose "
        "rows the teacher received"
      )
    example = self._inputs.batch(np.array([id]), np.zeros(1, np.int32))
    tokens = example["tokens"][0]
    label = example["label"][0]
    labeled = np.flatnonzero(label >= 0)
    if not labeled.size:
      return []
    end = labeled[-1] + 1
    wrong = labeled[:-1][label[labeled[:-1]] != tokens[labeled[:-1] + 1]]
    if wrong.size:
      at = wrong[0]
      raise ValueError(
        f"{row_name(id, 0, (at,))}: expected the next token as label, {tokens[at + 1]}, got "
        f"{label[at]}: shift the labels by one, the teacher predicts the next token"
      )
    return [*tokens[:end].tolist(), int(label[end - 1])]

  def values(
    self, id: int, prompt: Sequence[int], prompt_logprobs: Any, token_ids: Any = None
  ) -> dict[str, Any]:
    """Returns the values of a row for `import_rows`; positions without a later label are uniform.

    Args:
      id: of the row.
      prompt: `prompt(id)`.
      prompt_logprobs: one entry for each of the prompt's tokens: None for the first, then
        {token: {"logprob": float, "rank": int}}, of the most probable tokens and the prompt's own.
      token_ids: the prompt's tokens as the teacher had them; None: unknown.

    Raises:
      ValueError: it is of other tokens, too short, or has fewer tokens than asked; the message
        names id, view and position.
    """
    name = row_name(id, 0)
    if token_ids is not None and list(token_ids) != list(prompt):
      at = _first_difference(token_ids, prompt)
      raise ValueError(
        f"{row_name(id, 0, (at,))}: expected the tokens of the source and the last label, "
        f"{join_first(prompt[at:])}, got {join_first(token_ids[at:])}: send token ids, not text"
      )
    if not isinstance(prompt_logprobs, list) or len(prompt_logprobs) != len(prompt):
      count = len(prompt_logprobs) if isinstance(prompt_logprobs, list) else prompt_logprobs
      raise ValueError(
        f"{name}: expected prompt_logprobs of {len(prompt)} tokens, those of the source and the "
        f"last label, got {count!r}: send token ids, all of them"
      )
    values = self.uniform()
    indices, log_probs, labels = (values[key] for key in (*TARGETS, LABELS))
    for at, (token, entry) in enumerate(zip(prompt[1:], prompt_logprobs[1:])):
      position = row_name(id, 0, (at,))
      indices[at], log_probs[at], labels[at] = self._position(position, token, entry)
    return {**values, "temperature": 1.0}

  def uniform(self) -> dict[str, np.ndarray]:
    """Returns the values of a row without labels: uniform distributions at all positions."""
    length = self._inputs.shapes["tokens"].shape[1]
    return {
      "indices": np.tile(np.arange(self._top_k), (length, 1)),
      "logprobs": np.full((length, self._top_k), -math.log(self._classes)),
      LABELS: np.full(length, np.nan),
    }

  def _position(self, name: str, token: int, entry: Any) -> tuple[list[int], list[float], float]:
    """Returns the most probable tokens, their log-probabilities, and that of the next token."""
    if not isinstance(entry, dict):
      raise ValueError(f"{name}: expected a mapping from token to log-probability, got {entry!r}")
    listed = [_parse(name, text, value) for text, value in entry.items()]
    log_prob_of = {number: log_prob for _, log_prob, number in listed}
    if token not in log_prob_of:
      raise ValueError(
        f"{name}: expected the log-probability of the next token, {token}, got only those of "
        f"{join_first(log_prob_of)}: the teacher may have other tokens"
      )
    ranks = [rank for rank, _, _ in listed]
    if None in ranks:
      listed.sort(key=lambda item: -item[1])
      ranks = list(range(1, len(listed) + 1))
    else:
      listed.sort()
      ranks.sort()
    if ranks[: self._top_k] != list(range(1, self._top_k + 1)):
      raise ValueError(
        f"{name}: expected the {self._top_k} most probable tokens, got the ranks "
        f"{join_first(ranks)}: ask the teacher for prompt_logprobs={self._top_k}"
      )
    top = listed[: self._top_k]
    return [number for *_, number in top], [x for _, x, _ in top], log_prob_of[token]


def _parse(name: str, text: str, value: Any) -> tuple[Any, float, int]:
  """Returns rank, log-probability and number of a token."""
  log_prob, rank = value, None
  if isinstance(value, dict):
    log_prob, rank = value.get("logprob"), value.get("rank")
  is_number = type(log_prob) is float or (type(log_prob) is int and abs(log_prob) < 2**53)
  is_token = text.isdecimal() and len(text) < 12
  if not (is_token and is_number and isinstance(rank, int | None)):
    raise ValueError(
      f'{name}: expected "token number": {{"logprob": number, "rank": number}}, got '
      f"{text!r}: {value!r}: ask for token ids"
    )
  return rank, -math.inf if log_prob <= NO_CLASS else float(log_prob), int(text)


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
  """Returns the first index at which two sequences differ."""
  return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
