"""Masks of the tokens that terms of layers compare and relate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.objectives.calls import valid_rows
from distill_jax.objectives.layer_maps import last_entries
from distill_jax.types import Batch


class Masks(NamedTuple):
  """Masks of the last tokens.

  Attributes:
    counted: tokens that have a value, bool [B, L].
    exists: tokens that others may relate to, bool [B, L].
    same: pairs of tokens of one document, bool [B, L, L]; None: all.
  """

  counted: jax.Array
  exists: jax.Array
  same: jax.Array | None


def token_masks(batch: Batch, shape: tuple[int, int], last: int | None) -> Masks:
  """Returns the masks of the last tokens of outputs [B, L, ...] of this shape."""
  label = batch.get("label")
  segments = batch.get("segments")
  labeled = jnp.ones(shape, bool)
  if label is not None and label.shape == shape and jnp.issubdtype(label.dtype, jnp.integer):
    labeled = jnp.asarray(label) >= 0
  if segments is None:
    exists = labeled
    same = None
  elif segments.shape != shape:
    raise ValueError(
      f"segments: expected the outputs' rows and tokens {shape}, got {segments.shape}"
    )
  else:
    segments = jnp.asarray(segments)
    exists = segments >= 0
    same = last_entries(segments[:, :, None] == segments[:, None, :], last, (1, 2))
  exists = valid_rows(batch, exists)
  return Masks(last_entries(labeled & exists, last, (1,)), last_entries(exists, last, (1,)), same)
