"""Statistics of CTC frames: the likelihood of transcripts, and the comparison with a teacher."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.losses.ctc import check_blank
from distill_jax.objectives.calls import outputs_of
from distill_jax.objectives.ctc import ctc_rows
from distill_jax.objectives.frame_counts import (
  LENGTHS,
  check_frames,
  find_lengths,
  frame_counts,
  is_valid_frame,
)
from distill_jax.tasks.logits import OUTSIDE, means
from distill_jax.types import Batch, Outputs


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
    'teacher_kl' over frames; and `OUTSIDE`, the numbers of rows whose label is no transcript, and
    of those whose number of frames is outside [0, T], int32 [2].

  Raises:
    ValueError: as `objectives.ctc`.
  """
  logits = outputs_of(outputs, "logits", "student")
  check_frames("logits", logits, "student")
  check_blank(blank, logits.shape[-1])
  logits = logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))
  lengths = find_lengths(LENGTHS, "logits", outputs, batch)
  rows = ctc_rows(logits, lengths, "label", blank, batch)
  statistics: dict[str, Any] = {
    "nll": reduce.total(rows.values, rows.where),
    "too_long": reduce.total(rows.too_long, rows.transcripts.labeled),
    OUTSIDE: _counts(rows.transcripts.invalid, rows.outside),
  }
  if teacher is None or teacher.get("logits", logits[:0]).shape != logits.shape:
    return statistics
  teacher_logits = teacher["logits"].astype(logits.dtype)
  shapes = (logits.shape[:2], logits.shape[:2])
  counts = frame_counts(LENGTHS, "logits", (outputs, teacher), shapes, batch)
  compared = is_valid_frame(jnp.minimum(counts.student, counts.teacher), logits.shape[1])
  if counts.where is not None:
    compared &= counts.where[:, None]
  same = logits.argmax(-1) == teacher_logits.argmax(-1)
  divergence = kl_divergence(logits, teacher_logits)
  return statistics | {
    OUTSIDE: _counts(rows.transcripts.invalid, rows.outside | counts.outside),
    "agreement": reduce.total(same, compared),
    "teacher_kl": reduce.total(divergence, compared),
  }


def _counts(invalid: jax.Array, outside: jax.Array) -> jax.Array:
  return jnp.stack([invalid.sum(), outside.sum()]).astype(jnp.int32)


def ctc_means(statistics: Mapping[str, Any]) -> dict[str, float]:
  """Returns the mean of each pair of `ctc_statistics` that counted something.

  Raises:
    ValueError: `OUTSIDE` counted rows: compiled code cannot raise.
  """
  invalid, outside = (int(count) for count in statistics[OUTSIDE])
  if invalid:
    raise ValueError(
      f"label: expected classes of the network, then padding, got {invalid} other rows: pad after "
      "the last class, with the blank or -1"
    )
  if outside:
    raise ValueError(
      f"lengths: expected numbers of valid frames from 0 to that of all, got {outside} rows of "
      "others: count the frames of the logits, not those of the input"
    )
  return means({name: value for name, value in statistics.items() if name != OUTSIDE})
