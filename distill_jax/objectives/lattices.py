"""Compares the lattices of two transducers."""

import jax.numpy as jnp

from distill_jax import losses
from distill_jax.losses.ctc import check_blank
from distill_jax.objectives.calls import outputs_of
from distill_jax.objectives.frame_counts import LENGTHS, frame_counts, is_valid_frame
from distill_jax.objectives.terms import Term
from distill_jax.objectives.transcripts import read_transcripts
from distill_jax.types import Variables


def lattice(
  *, output: str = "logits", entry: str = "label", lengths: str = LENGTHS, blank: int = 0
) -> Term:
  """`losses.rnnt_three_way` at the valid nodes of a transducer's lattice [B, T, U + 1, V].

  A node (t, u) is valid where t is below the row's number of frames, and u at most its number of
  classes. The others are blanked: a NaN there reaches neither value nor gradient. The mean is over
  the valid nodes of the global batch; the paper sums them. Rows without a transcript do not count.

  Args:
    output: name of the output of both networks that holds the lattice's logits.
    entry, blank: as in `ctc`: the transcripts, int [B, U], padded.
    lengths: as in `frames`.

  Raises:
    ValueError: in init, logits that are no lattice, shapes that differ (both are shown), or a blank
      that is no class; in a step, lengths or transcripts that do not fit.

  >>> from distill_jax import objectives
  >>> outputs = {"logits": jnp.zeros((1, 2, 3, 4)), "lengths": jnp.array([1])}
  >>> batch = {"label": jnp.array([[2, -1]])}
  >>> (values, where), _ = objectives.lattice().apply(
  ...   {}, {}, outputs, outputs, batch, step=0, key=None
  ... )
  >>> where.tolist()  # one frame, and one class
  [[[True, True, False], [False, False, False]]]
  """

  def sides(student, teacher):
    s, t = (outputs_of(x, output, side) for x, side in ((student, "student"), (teacher, "teacher")))
    if len(s.shape) != 4 or s.shape != t.shape:
      raise ValueError(
        f"{output}: expected a lattice [rows, frames, labels + 1, classes] of both networks, got "
        f"{tuple(s.shape)} of the student and {tuple(t.shape)} of the teacher"
      )
    check_blank(blank, s.shape[-1])
    return s, t

  def init(key, student, teacher):
    del key
    sides(student, teacher)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, step, key, axis_name
    s, t = sides(student, teacher)
    rows, frames, nodes, classes = s.shape
    transcripts = read_transcripts(batch, entry, rows, classes, blank)
    label = transcripts.label
    if label.shape[1] != nodes - 1:
      raise ValueError(
        f"{entry}: expected {nodes - 1} classes a row for a lattice {tuple(s.shape)}, got "
        f"{label.shape[1]}"
      )
    counts = frame_counts(lengths, output, (student, teacher), (s.shape[:2],) * 2, batch)
    count = jnp.where(transcripts.labeled, jnp.minimum(counts.student, counts.teacher), 0)
    is_node = jnp.arange(nodes) <= transcripts.length[:, None]
    where = is_valid_frame(count, frames)[..., None] & is_node[:, None]
    s, t = (jnp.where(where[..., None], x, 0) for x in (s, t))
    # The loss wants a class at padding, too: any but the blank.
    is_class = jnp.arange(nodes - 1) < transcripts.length[:, None]
    label = jnp.where(is_class, label, 1 if blank == 0 else 0)
    values = losses.rnnt_three_way(s, t, label, blank=blank)
    # After its last class a row has no next one, also where it is shorter than the lattice.
    last = transcripts.length[:, None, None, None]
    s, t = (jnp.take_along_axis(x, last, 2, mode="clip") for x in (s, t))
    ends = losses.rnnt_three_way(s, t, label[:, :0], blank=blank)
    values = jnp.where((jnp.arange(nodes) == transcripts.length[:, None])[:, None], ends, values)
    invalid = (transcripts.invalid | (counts.outside & transcripts.labeled))[:, None, None]
    return (jnp.where(invalid, jnp.nan, values), where | invalid), state

  return Term(init, apply)
