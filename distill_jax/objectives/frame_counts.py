"""Reads the numbers of valid frames of CTC networks and transducers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.errors import suggest
from distill_jax.objectives.calls import valid_rows
from distill_jax.types import Batch, Outputs

LENGTHS = "lengths"


class Counts(NamedTuple):
  """Numbers of valid frames of both networks.

  Attributes:
    student, teacher: int [B].
    where: the rows that count, bool [B], or None for all.
    outside: rows of which a number is outside [0, T], bool [B].
  """

  student: jax.Array
  teacher: jax.Array
  where: jax.Array | None
  outside: jax.Array


def frame_counts(
  name: str,
  output: str,
  outputs: tuple[Outputs, Outputs],
  shapes: tuple[tuple[int, ...], tuple[int, ...]],
  batch: Batch,
) -> Counts:
  """Returns the numbers of valid frames; a teacher without any has those of the student.

  Raises:
    ValueError: as `check_lengths`, or numbers that cannot be those of both frame rates.
  """
  rows = valid_rows(batch)
  found = [find_lengths(name, output, x, batch) for x in outputs]
  in_outputs = any(_lengths_of_output(name, output, x) is not None for x in outputs)
  if shapes[0] != shapes[1] and name in batch and not in_outputs:
    raise ValueError(
      f"lengths: expected numbers of valid frames of each network, got one entry {name!r} of the "
      f"batch for {shapes[0][1]} frames of the student and {shapes[1][1]} of the teacher: let both "
      f"networks return {name!r}"
    )
  if found[1] is None and found[0] is not None:
    if shapes[0] != shapes[1]:
      raise ValueError(
        f"lengths: expected the teacher's numbers of valid frames next to the student's, got none "
        f"for {shapes[1][1]} frames of the teacher and {shapes[0][1]} of the student: let the "
        f"teacher return {name!r}, and cache it with cache.Codes"
      )
    found[1] = found[0]
  s, s_outside = check_lengths(found[0], shapes[0], "student", rows)
  t, t_outside = check_lengths(found[1], shapes[1], "teacher", rows)
  return Counts(s, t, rows, s_outside | t_outside)


def find_lengths(name: str, output: str, outputs: Outputs, batch: Batch) -> jax.Array | None:
  """Returns the numbers of valid frames of an output, as they are; None where nothing tells them.

  Args:
    name: of an output of the network, of that of a cohort's network ('0/lengths' for '0/logits'),
      or of an entry of the batch. 'lengths' may be missing.
    output: name of the output with the frames.
  """
  lengths = _lengths_of_output(name, output, outputs)
  if lengths is not None:
    return lengths
  if name in batch:
    return jnp.asarray(batch[name])
  if name != LENGTHS:
    raise ValueError(
      f"lengths: expected {name!r} among the outputs or the batch's entries, got none"
      f"{suggest(name, {*outputs, *batch})}"
    )
  return None


def _lengths_of_output(name: str, output: str, outputs: Outputs) -> jax.Array | None:
  prefix = output.rpartition("/")[0]
  for key in (f"{prefix}/{name}", name) if prefix else (name,):
    if key in outputs:
      return jnp.asarray(outputs[key])
  return None


def check_lengths(
  lengths: jax.Array | None, shape: tuple[int, ...], side: str, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Returns numbers of valid frames, int [B], and which of them are outside [0, T], bool [B].

  Args:
    lengths: int [B], or None for all frames.
    shape: of the frames, [B, T, ...].
    side: 'student' or 'teacher', for messages.
    where: the rows that count, bool [B], or None.

  Raises:
    ValueError: another shape or dtype; outside of compiled functions also a number outside [0, T].
  """
  rows, frames = shape[:2]
  if lengths is None:
    return jnp.full(rows, frames), jnp.zeros(rows, bool)
  if lengths.shape != (rows,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(
      f"lengths: expected the {side}'s numbers of valid frames, int ({rows},), got {lengths.dtype} "
      f"{lengths.shape}"
    )
  outside = (lengths < 0) | (lengths > frames)
  if where is not None:
    outside &= where
  if not isinstance(outside, jax.core.Tracer) and bool(outside.any()):
    raise ValueError(
      f"lengths: expected numbers of the {side}'s frames, 0 to {frames}, got "
      f"{int(lengths[outside][0])}: count the frames of the logits, not those of the input"
    )
  return jnp.clip(lengths, 0, frames).astype(jnp.int32), outside


def is_valid_frame(lengths: jax.Array, frames: int) -> jax.Array:
  """Returns which frames are valid, bool [B, T]."""
  return jnp.arange(frames) < lengths[:, None]


def check_frames(output: str, value: Any, side: str) -> None:
  """Raises a ValueError for an output that is no [B, T, ...], T > 0."""
  shape = tuple(getattr(value, "shape", ()))
  if len(shape) != 3 or not shape[1]:
    hint = ": pad its inputs to more frames, or subsample less" if len(shape) == 3 else ""
    raise ValueError(
      f"{output}: expected logits [rows, frames, classes] of the {side}, got {list(shape)}{hint}"
    )
