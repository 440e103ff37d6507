"""Reads transcripts of CTC networks and transducers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.objectives.calls import batch_entry, has_true_label, valid_rows
from distill_jax.objectives.class_labels import record_transcripts
from distill_jax.types import Batch


class Transcripts(NamedTuple):
  """Transcripts of a batch.

  Attributes:
    label: classes, int [B, U]; what follows a transcript is arbitrary.
    length: number of classes, int [B].
    labeled: which rows have a transcript, and count, bool [B].
    invalid: which of these are no transcript, bool [B]; all are False outside of a compiled
      function, where such a row raises.
  """

  label: jax.Array
  length: jax.Array
  labeled: jax.Array
  invalid: jax.Array


def read_transcripts(batch: Batch, entry: str, rows: int, classes: int, blank: int) -> Transcripts:
  """Returns the transcripts of an entry int [B, U]; the blank or negative numbers pad it.

  Raises:
    ValueError: another shape or dtype; outside of compiled functions also a number that is no class
      and a class after padding.
  """
  label = batch_entry(batch, entry)
  if label.ndim != 2 or not jnp.issubdtype(label.dtype, jnp.integer) or 0 in label.shape:
    raise ValueError(
      f"{entry}: expected transcripts, int [{rows}, U], got {label.dtype} {label.shape}: write the "
      f"classes of each row in order, then the blank {blank} or -1; a row of -1 has no transcript"
    )
  if len(label) != rows:
    raise ValueError(f"{entry}: expected {rows} rows, those of the logits, got {len(label)}")
  record_transcripts(entry, classes)
  label = label.astype(int)
  exists = (label >= 0) & (label != blank)
  labeled = valid_rows(batch, has_true_label(batch, (label >= 0).any(1)))
  has_gap = (exists[:, 1:] & ~exists[:, :-1]).any(1)
  invalid = labeled & (has_gap | (exists & (label >= classes)).any(1))
  if not isinstance(invalid, jax.core.Tracer) and bool(invalid.any()):
    raise ValueError(
      f"{entry}: expected classes below {classes}, then padding, got {label[invalid][0].tolist()}: "
      f"pad after the last class, with the blank {blank} or -1"
    )
  return Transcripts(jnp.clip(label, 0, classes - 1), exists.sum(1), labeled, invalid)


def frames_needed(transcripts: Transcripts) -> jax.Array:
  """Returns how many frames CTC needs at least: one a class, and a blank between equal neighbors.

  >>> label, length = jnp.array([[2, 2, 3]]), jnp.array([3])
  >>> frames_needed(Transcripts(label, length, length > 0, length < 0))
  Array([4], dtype=int32)
  """
  label, length = transcripts.label, transcripts.length
  is_inside = jnp.arange(1, label.shape[1]) < length[:, None]
  repeats = (is_inside & (label[:, 1:] == label[:, :-1])).sum(1)
  return length + repeats
