"""Statistics of CTC frames: the likelihood of transcripts, and the comparison with a teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.tasks.logits import OUTSIDE
from distill_jax.types import Batch, Outputs

_LEAST = -1e4  # log-probability that stands for 0 in optax, which multiplies -inf by 0


def ctc_statistics(
  outputs: Outputs, batch: Batch, teacher: Outputs | None, blank: int
) -> dict[str, Any]:
  """Returns sums over rows and frames.

  Args:
    outputs: 'logits' [B, T, V], and 'lengths' int [B] (without it: all frames are valid).
    batch: 'label' int [B, U], the blank or negative behind the tokens; 'where' bool [B].
    teacher: outputs of the teacher, of the same frames and classes to be compared; or None.
    blank: class of no token.

  Returns:
    Pairs (sum, count): 'nll' (nats a row, of the rows whose target fits its frames), 'too_long' (of
    the labeled rows, those whose target does not fit), and with a teacher 'agreement' and
    'teacher_kl' over frames; and `OUTSIDE`, the number of labels that are no class.
  """
  logits = outputs_of(outputs, "logits", "student")
  logits = logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))
  label = batch_entry(batch, "label")
  rows, frames, classes = logits.shape
  valid = jnp.asarray(batch.get("where", jnp.ones(rows, bool)))
  lengths = frame_lengths(outputs, batch)
  is_token = (label >= 0) & (label != blank)
  labeled = valid & (label >= 0).any(1)
  fits = (_frames_needed(label, is_token) <= lengths) & (lengths > 0)
  outside = (label >= classes) & valid[:, None]
  statistics = {
    "nll": reduce.total(_nll(logits, lengths, label, is_token, blank), labeled & fits),
    "too_long": reduce.total(~fits, labeled),
    OUTSIDE: outside.sum(dtype=jnp.int32),
  }
  if teacher is None or teacher.get("logits", logits[:0]).shape != logits.shape:
    return statistics
  teacher_logits = teacher["logits"].astype(logits.dtype)
  both = jnp.minimum(lengths, frame_lengths(teacher, batch))
  compared = (jnp.arange(frames) < both[:, None]) & valid[:, None]
  same = logits.argmax(-1) == teacher_logits.argmax(-1)
  divergence = kl_divergence(logits, teacher_logits)
  return statistics | {
    "agreement": reduce.total(same, compared),
    "teacher_kl": reduce.total(divergence, compared),
  }


def frame_lengths(outputs: Outputs, batch: Batch) -> jax.Array:
  """Returns the number of valid frames of each row, int [B]: 'lengths' of the network or of the
  batch, or all of them.
  """
  rows, frames = outputs["logits"].shape[:2]
  lengths = jnp.asarray(outputs.get("lengths", batch.get("lengths", jnp.full(rows, frames))))
  return jnp.clip(lengths, 0, frames)


def _frames_needed(label: jax.Array, is_token: jax.Array) -> jax.Array:
  """Returns the least number of frames of each target: equal neighbors need a blank between."""
  repeats = (label[:, 1:] == label[:, :-1]) & is_token[:, 1:]
  return is_token.sum(1) + repeats.sum(1)


def _nll(
  logits: jax.Array, lengths: jax.Array, label: jax.Array, is_token: jax.Array, blank: int
) -> jax.Array:
  """Returns -log p(label) of each row; not finite or huge where the label does not fit."""
  padding = jnp.arange(logits.shape[1]) >= lengths[:, None]
  # What a network returns at padding may be NaN.
  log_probs = jax.nn.log_softmax(jnp.where(padding[..., None], 0, logits))
  log_probs = jnp.maximum(log_probs, _LEAST)
  label = jnp.where(is_token, label, blank)
  return optax.ctc_loss(
    log_probs,
    padding.astype(logits.dtype),
    label,
    1 - is_token.astype(logits.dtype),
    blank_id=blank,
  )
