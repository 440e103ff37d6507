"""Checks, embeds, numbers and averages rows of tokens, for decoders and encoders alike."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def check_token_rows(
  tokens: jax.Array, max_length: int, *, field: str = "tokens", **entries: jax.Array | None
) -> None:
  """Checks the shapes of tokens [B, L], the entry `field`, and of entries that go with them.

  Raises:
    ValueError: no tokens, more than `max_length`, shapes that differ, or segments that are a mask.
  """
  if tokens.ndim != 2 or not tokens.size:
    raise ValueError(f"{field}: expected [rows, length], not empty, got {tokens.shape}")
  if tokens.shape[1] > max_length:
    raise ValueError(
      f"{field}: expected rows of at most max_length={max_length}, got {tokens.shape}: cut the "
      "texts"
    )
  for name, value in entries.items():
    if value is None:
      continue
    if value.shape != tokens.shape:
      raise ValueError(f"{name}: expected the shape of {field}, {tokens.shape}, got {value.shape}")
    # False is no negative number: padding would be read.
    if name.endswith("segments") and value.dtype == jnp.bool_:
      raise ValueError(
        f"{name}: expected integers, negative for padding, got bool: write np.where(mask, 0, -1)"
      )


def embed_tokens(embed: nnx.Embed, tokens: jax.Array, dtype: Any) -> jax.Array:
  """Returns the embeddings [B, L, C] of tokens [B, L]; NaN for a token outside the vocabulary."""
  # A negative index would count from the end: one above the vocabulary gives NaN.
  indices = jnp.where(tokens < 0, embed.num_embeddings, tokens)
  table = embed.embedding[...].astype(dtype)
  return table.at[indices].get(mode="fill", fill_value=jnp.nan)


def token_positions(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
  """Returns the position of each token in its document, int32 [B, L], from 0.

  Args:
    tokens: [B, L].
    segments: int [B, L], the document of each token, each in one piece; None: rows are documents.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  if segments is None:
    return positions
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def mean_of_tokens(hidden: jax.Array, segments: jax.Array | None) -> jax.Array:
  """Returns the mean [B, C] of hidden [B, L, C] over all but padding; NaN for a row without tokens.

  Args:
    hidden: [B, L, C].
    segments: int [B, L], negative for padding; None: there is none.
  """
  if segments is None:
    return hidden.mean(1)
  is_token = segments[..., None] >= 0
  # Zeros over zero: a mask that hides a whole row is reported, not trained on.
  count = is_token.sum(1).astype(hidden.dtype)
  return jnp.where(is_token, hidden, 0).sum(1) / count
