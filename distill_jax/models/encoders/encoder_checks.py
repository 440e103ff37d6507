"""Checks rows of texts against an encoder before training: compiled code cannot raise."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.data.checks import example_name
from distill_jax.data.text.sentences import SentenceTokenizer
from distill_jax.models.encoders.encoder_config import EncoderConfig

_MAX_PADDED_TOKENS = 127
"""Tokens that an embedding may have in addition: some are padded to a multiple of up to 128."""


def check_texts(
  arrays: Mapping[str, Any], config: EncoderConfig, tokenizer: SentenceTokenizer | None = None
) -> None:
  """Checks that an encoder can read all rows of texts, and that they have no label on padding.

  Args:
    arrays: `source.arrays`, or a batch: 'tokens' [N, L], and maybe 'segments', 'token_types',
      'label' and 'id'.
    config: of the encoder.
    tokenizer: checked against the embedding; None: not checked.

  Raises:
    ValueError: a tokenizer of another vocabulary, rows longer than the positions, a token or a
      token type outside of the embeddings, a row whose mask hides everything, or a label on
      padding; the message names the entry and the example.

  >>> config = EncoderConfig(100, 16, num_layers=2, num_heads=2)
  >>> check_texts({"tokens": np.array([[1, 99]])}, config)
  >>> check_texts({"tokens": np.array([[1, 100]])}, config)
  Traceback (most recent call last):
  ValueError: tokens: expected 0 to 99 by vocab_size=100, got 100 in row 0: use its tokenizer
  """
  if tokenizer is not None:
    _check_tokenizer(tokenizer, config)
  if "tokens" not in arrays:
    raise ValueError(
      f"tokens: expected an entry of texts [rows, length], got only {sorted(arrays)}"
    )
  tokens = np.asarray(arrays["tokens"])
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f"tokens: expected integers [rows, length], got {tokens.dtype} {tokens.shape}")
  if tokens.shape[1] > config.max_length:
    raise ValueError(
      f"tokens: expected at most the {config.max_length} positions of the encoder, got rows of "
      f"{tokens.shape[1]}: cut the texts with rows(..., length={config.max_length})"
    )
  ids = arrays.get("id")
  _check_range("tokens", tokens, config.vocab_size, "vocab_size", ids)
  if "token_types" in arrays and config.token_types:
    _check_range("token_types", arrays["token_types"], config.token_types, "token_types", ids)
  if "segments" in arrays:
    _check_padding(arrays, tokens.shape, ids)


def _check_tokenizer(tokenizer: SentenceTokenizer, config: EncoderConfig) -> None:
  if not 0 <= config.vocab_size - tokenizer.size <= _MAX_PADDED_TOKENS:
    raise ValueError(
      f"tokenizer: expected the {config.vocab_size:,} tokens of the encoder's embedding, got a "
      f"vocabulary of {tokenizer.size:,}: use the tokenizer that was released with it"
    )


def _check_range(name: str, values: Any, size: int, field: str, ids: Any) -> None:
  values = np.asarray(values)
  outside = (values < 0) | (values >= size)
  if outside.any():
    row, column = np.argwhere(outside)[0]
    raise ValueError(
      f"{name}: expected 0 to {size - 1} by {field}={size}, got {values[row, column]} in "
      f"{example_name(ids, row)}: use its tokenizer"
    )


def _check_padding(arrays: Mapping[str, Any], shape: tuple[int, ...], ids: Any) -> None:
  is_token = np.asarray(arrays["segments"]) >= 0
  if is_token.shape != shape:
    raise ValueError(f"segments: expected the shape of tokens, {shape}, got {is_token.shape}")
  empty = ~is_token.any(1)
  if empty.any():
    raise ValueError(
      f"segments: expected a token in each row, got only padding in "
      f"{example_name(ids, int(empty.argmax()))}: leave it out; segments are 0 for tokens and -1 "
      "for padding, mask - 1"
    )
  label = np.asarray(arrays.get("label", 0))
  if label.shape == shape and np.issubdtype(label.dtype, np.integer):
    on_padding = ((label >= 0) & ~is_token).any(1)
    if on_padding.any():
      raise ValueError(
        f"label: expected -1 on padding, got a class in "
        f"{example_name(ids, int(on_padding.argmax()))}: mark what is no token as -1"
      )
