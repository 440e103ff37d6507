"""Trains on transcripts without an alignment: connectionist temporal classification (CTC)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax import reduce
from distill_jax.losses.ctc import check_blank
from distill_jax.objectives.calls import outputs_of
from distill_jax.objectives.frame_counts import (
  LENGTHS,
  check_frames,
  check_lengths,
  find_lengths,
  is_valid_frame,
)
from distill_jax.objectives.left_out import TOO_LONG, report_left_out
from distill_jax.objectives.terms import Term
from distill_jax.objectives.transcripts import Transcripts, frames_needed, read_transcripts
from distill_jax.types import Batch, Variables

_MISSING = 1e4
"""Nats by which a class that does not exist (a logit of -inf) is below the largest one."""


def ctc(
  *,
  output: str = "logits",
  entry: str = "label",
  lengths: str = LENGTHS,
  blank: int = 0,
  per_label: bool = False,
) -> Term:
  """Negative log-likelihood of the transcript over all its alignments: `optax.ctc_loss`.

      ctc()
      ctc(output="ctc_logits", entry="transcript")  # a network that has an attention decoder, too

  The student gives logits [B, T, V] and 'lengths', the numbers of valid frames. The batch's
  transcripts are classes other than the blank, int [B, U], then padding: the blank or -1. A row
  of -1 alone has no transcript and does not count; a row of the blank alone has an empty one.

  A transcript that needs more frames than are valid (one a class, and one between equal
  neighbors) has probability 0: it does not count, and the metric '<term>/too_long' is the fraction
  of such rows. So is one without any valid frame. Rows that the batch's 'where' masks do not
  count, nor do 'generated' ones.

  Lengths beyond T, a class >= V and a class after padding raise, and make the loss NaN in a
  compiled function, which cannot raise. Logits in bfloat16 are computed in float32.

  Args:
    output: name of the student's output [B, T, V].
    entry: name of the batch's entry with the transcripts.
    lengths: name of the output, or of the batch's entry, with the numbers of valid frames, int
      [B]. Without 'lengths' all frames are valid.
    blank: class of the blank.
    per_label: divide each row's value by its number of classes (at least 1), as
      `torch.nn.CTCLoss` does by default. False: nats per row, as optax, ESPnet and PaddleOCR.

  Raises:
    ValueError: in init, logits of another shape, or a blank that is no class; in a step, lengths or
      transcripts that do not fit.

  >>> import jax.numpy as jnp
  >>> from distill_jax import objectives
  >>> term = objectives.ctc()
  >>> student = {"logits": jnp.zeros((2, 2, 3)), "lengths": jnp.array([2, 2])}
  >>> batch = {"label": jnp.array([[1, -1], [2, 2]])}  # 2 2 needs three frames.
  >>> (values, where), _ = term.apply({}, {}, student, {}, batch, step=0, key=None)
  >>> values.round(4), where.tolist()  # log(3): 3 of 9 alignments
  (Array([1.0986, 0.    ], dtype=float32), [True, False])
  """

  def init(key, student, teacher):
    del key, teacher
    logits = outputs_of(student, output, "student")
    check_frames(output, logits, "student")
    check_blank(blank, logits.shape[-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, teacher, step, key, axis_name
    logits = jnp.asarray(outputs_of(student, output, "student"))
    check_frames(output, logits, "student")
    found = find_lengths(lengths, output, student, batch)
    rows = ctc_rows(logits, found, entry, blank, batch)
    report_left_out(TOO_LONG, rows.too_long, rows.transcripts.labeled)
    is_nan = rows.transcripts.invalid | rows.outside
    values = rows.values / jnp.maximum(rows.num_classes, 1) if per_label else rows.values
    return (jnp.where(is_nan, jnp.nan, values), rows.where | is_nan), state

  return Term(init, apply)


class CtcRows(NamedTuple):
  """CTC of each row of a batch.

  Attributes:
    values: nats, [B]; 0 where a row does not count.
    where: which rows count: those with a transcript that fits its frames, bool [B].
    num_classes: numbers of classes of the rows that count, int [B].
    transcripts: those of all rows.
    too_long: which transcripts do not fit, bool [B].
    outside: rows of which the number of valid frames is outside [0, T], bool [B].
  """

  values: jax.Array
  where: jax.Array
  num_classes: jax.Array
  transcripts: Transcripts
  too_long: jax.Array
  outside: jax.Array


def ctc_rows(
  logits: jax.Array, lengths: jax.Array | None, entry: str, blank: int, batch: Batch
) -> CtcRows:
  """Returns CTC of logits [B, T, V] with `lengths` int [B] valid frames (None: all).

  Raises:
    ValueError: as `read_transcripts` and `check_lengths`.
  """
  rows, frames, classes = logits.shape
  transcripts = read_transcripts(batch, entry, rows, classes, blank)
  count, outside = check_lengths(lengths, logits.shape, "student", transcripts.labeled)
  too_long = transcripts.labeled & ((frames_needed(transcripts) > count) | (count == 0))
  where = transcripts.labeled & ~too_long
  is_valid = is_valid_frame(count, frames) & where[:, None]
  z = logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))
  # Blank before the loss: after it, a NaN would reach the gradient as NaN times zero.
  z = jnp.where(is_valid[..., None], z, 0)
  peak = jax.lax.stop_gradient(z.max(-1, keepdims=True))
  z = jnp.where(z == -jnp.inf, peak - _MISSING, z)  # Optax multiplies log-probabilities by 0.
  # A transcript that does not fit becomes empty: its own gradient would be of numbers near 1e5.
  length = jnp.where(where, transcripts.length, 0)
  is_padding = jnp.arange(transcripts.label.shape[1]) >= length[:, None]
  values = optax.ctc_loss(
    z,
    (~is_valid).astype(z.dtype),
    jnp.where(is_padding, blank, transcripts.label),
    is_padding.astype(z.dtype),
    blank_id=blank,
  )
  return CtcRows(jnp.where(where, values, 0), where, length, transcripts, too_long, outside)
