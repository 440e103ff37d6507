"""Masks of the tokens that terms of layers compare and relate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.objectives.calls import batch_entry, valid_rows
from distill_jax.objectives.layer_maps import last_entries
from distill_jax.types import Batch

SOURCE = "source_segments"
"""The batch's entry that says which tokens of an encoder-decoder's source exist."""

Entries = tuple[str | None, str | None]
"""The entries of the batch with the segments of queries and of keys; None: 'label' and
'segments', those of the tokens to predict; "": all tokens exist."""


class Masks(NamedTuple):
  """Masks of the last tokens.

  Attributes:
    counted: queries that have a value, bool [B, Q].
    exists: keys that queries may relate to, bool [B, K].
    same: pairs of a query and a key that it may relate to, bool [B, Q, K]; None: all.
  """

  counted: jax.Array
  exists: jax.Array
  same: jax.Array | None


class _Tokens(NamedTuple):
  """Tokens of one sequence: which have a value and which exist, bool [B, L]; their texts [B, L]."""

  counted: jax.Array
  exists: jax.Array
  segments: jax.Array | None


def segment_entries(
  name: str, segments: str | None = None, key_segments: str | None = None
) -> Entries:
  """Returns the entries with the segments of an output's queries and keys.

  Args:
    name: of the output: one that begins with 'encoder_' is of the source, the keys of one that
      begins with 'cross_' are.
    segments, key_segments: as in `attention`; None: by the name.
  """
  if segments is None and name.startswith("encoder_"):
    segments = SOURCE
  if key_segments is None:
    key_segments = SOURCE if name.startswith("cross_") else segments
  return segments, key_segments


def token_masks(
  batch: Batch,
  queries: tuple[int, int],
  keys: tuple[int, int],
  last: int | None,
  entries: Entries,
) -> Masks:
  """Returns the masks of the last tokens.

  Args:
    batch: the batch.
    queries, keys: rows and tokens of both.
    last: number of last tokens; None: all.
    entries: as in `segment_entries`.
  """
  query = _tokens(batch, queries, entries[0])
  key = query if entries[0] == entries[1] else _tokens(batch, keys, entries[1])
  counted, same = query.counted, None
  if key is not query:
    counted &= key.exists.any(1, keepdims=True)
  elif key.segments is not None:
    same = key.segments[:, :, None] == key.segments[:, None, :]
  if entries[1]:
    pairs = jnp.broadcast_to(key.exists[:, None], (*queries, keys[1]))
    same = pairs if same is None else same & pairs
  if same is not None:
    same = last_entries(same, last, (1, 2))
  return Masks(last_entries(counted, last, (1,)), last_entries(key.exists, last, (1,)), same)


def _tokens(batch: Batch, shape: tuple[int, int], entry: str | None) -> _Tokens:
  """Returns the tokens that an entry describes."""
  labeled = jnp.ones(shape, bool)
  if entry is None:
    label = batch.get("label")
    if label is not None and label.shape == shape and jnp.issubdtype(label.dtype, jnp.integer):
      labeled = jnp.asarray(label) >= 0
  segments = batch.get("segments") if entry is None else None
  if entry:
    segments = batch_entry(batch, entry)
  if segments is None:
    exists = labeled
  elif segments.shape != shape:
    raise ValueError(
      f"{entry or 'segments'}: expected the outputs' rows and tokens {shape}, got {segments.shape}"
    )
  elif segments.dtype == jnp.bool_:
    exists, segments = jnp.asarray(segments), None
  else:
    segments = jnp.asarray(segments)
    exists = segments >= 0
  exists = valid_rows(batch, exists)
  return _Tokens(labeled & exists, exists, segments)
