"""Compares the frames of two networks: one by one, or their mean distributions."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses, reduce
from distill_jax.losses import SparseTargets
from distill_jax.losses.ctc import MODES, check_blank
from distill_jax.objectives.calls import LossCall, any_output_of, outputs_of, prepare
from distill_jax.objectives.frame_counts import (
  LENGTHS,
  Counts,
  check_frames,
  frame_counts,
  is_valid_frame,
)
from distill_jax.objectives.hyperparameters import Number, at_step, check_number
from distill_jax.objectives.loss_checks import name_of
from distill_jax.objectives.sequences import resize_sequence
from distill_jax.objectives.terms import Term
from distill_jax.types import Outputs, Variables

_LEAST = 1e-37
"""The least probability of a resampled frame: its logarithm is finite in float32."""


def frames(
  loss: Callable[..., jax.Array],
  *,
  output: str = "logits",
  lengths: str = LENGTHS,
  blank: int = 0,
  mode: str = "all",
  resample: bool = False,
  **hyperparameters: Any,
) -> Term:
  """Compares logits [B, T, V] of both networks frame by frame; the mean is over all valid frames.

      frames(losses.ctc_frames, mode="collapsed")
      frames(losses.reverse_kl, mode="nonblank", temperature=2.0)
      frames(losses.sparse_kl)  # of a cached teacher's top k of many classes

  A frame is valid where both networks' 'lengths' say so. It is neither read nor compared beyond
  them: a NaN there reaches neither value nor gradient. A cached teacher without 'lengths' has those
  of the student, if it has as many frames.

  Args:
    loss: `(student [N, T, V], teacher [N, T, V], **hyperparameters) -> [N, T]`, one of the losses
      of logits, without labels; or one of `SparseTargets`, where the cached teacher stores them.
    output: name of the output of both networks that holds the logits.
    lengths: name of the output of each network, or of the batch's entry for both, with the numbers
      of valid frames, int [B]. Without 'lengths' all frames are valid.
    blank: class of the blank; a loss with an argument of this name gets it.
    mode: 'all'; 'nonblank': only frames where the teacher's most probable class is not the blank
      count, in the mean's denominator, too; 'collapsed': that of `losses.ctc_frames`.
    resample: where the frame rates differ, interpolate the teacher's probabilities linearly within
      its valid frames to the student's number of them. An average of several frames of the
      teacher has lower, wider spikes. False: other numbers of frames are refused.
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have, another mode, or a loss
      that reads labels or relates rows; in init, numbers of frames or classes that differ (both
      shapes are shown), or a blank that is no class; in a step, lengths that do not fit.

  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> term = objectives.frames(losses.kl_divergence)
  >>> outputs = {"logits": jnp.zeros((1, 3, 4)), "lengths": jnp.array([2])}
  >>> (values, where), _ = term.apply({}, {}, outputs, outputs, {}, step=0, key=None)
  >>> where.tolist()
  [[True, True, False]]
  """
  call = _prepare(loss, mode, blank, hyperparameters)
  is_sparse = "targets" in list(inspect.signature(loss).parameters)[1:2]

  def sides(student, teacher):
    s = outputs_of(student, output, "student")
    check_frames(output, s, "student")
    check_blank(blank, s.shape[-1])
    t = _targets(teacher, output, loss) if is_sparse else outputs_of(teacher, output, "teacher")
    if not is_sparse:
      check_frames(output, t, "teacher")
    if _frames_shape(t)[0] != s.shape[0] or (not resample and _frames_shape(t) != s.shape[:2]):
      raise ValueError(
        f"{output}: expected the teacher's rows and frames, got {list(s.shape)} of the student and "
        f"{[*_frames_shape(t), s.shape[-1]]} of the teacher: for other frame rates write "
        "frames(loss, resample=True) or objectives.ctc_mean"
      )
    return s, t

  def init(key, student, teacher):
    del key
    s, t = sides(student, teacher)
    if resample and not is_sparse:
      t = jax.ShapeDtypeStruct((*s.shape[:2], t.shape[-1]), t.dtype)
    with _naming_classes(output, s, t):
      call.check(s, t, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key
    s, t = sides(student, teacher)
    counts = frame_counts(
      lengths, output, (student, teacher), (s.shape[:2], _frames_shape(t)), batch
    )
    is_valid = is_valid_frame(_compared(counts, resample), s.shape[1])
    if resample and not is_sparse:
      t = _resampled(t, counts, s.shape[1])
    if mode == "nonblank":
      is_valid &= ~_is_blank(t, blank)
    where = is_valid if counts.where is None else is_valid & counts.where[:, None]
    with _naming_classes(output, s, t):
      values, _ = call.value(s, t, {"where": where}, step, axis_name)
    values = jnp.where(counts.outside[:, None], jnp.nan, values)
    return (values, where | counts.outside[:, None]), state

  return Term(init, apply)


def ctc_mean(
  loss: Callable[..., jax.Array] = losses.kl_divergence,
  *,
  output: str = "logits",
  lengths: str = LENGTHS,
  temperature: Number = 1.0,
  **hyperparameters: Any,
) -> Term:
  """Compares the mean over valid frames of both networks' probabilities: `losses.ctc_mean`.

      ctc_mean(losses.kl_divergence, temperature=0.5)  # PP-OCRv4, at weight 4

  It needs one alphabet, and neither one frame rate nor spikes at the same times. The mean is over
  the rows with a valid frame on both sides.

  Args:
    loss: `(student [B, V], teacher [B, V], **hyperparameters) -> [B]`, one of the losses of logits,
      without labels.
    output, lengths: as in `frames`; numbers of frames that differ need lengths of both networks, or
      of neither.
    temperature: > 0, of the frames' softmax, or a schedule of the step.
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have, or a temperature <= 0; in
      init, rows or classes that differ (both shapes are shown); in a step, lengths that do not fit.

  >>> import jax.numpy as jnp
  >>> from distill_jax import objectives
  >>> term = objectives.ctc_mean()
  >>> student, teacher = {"logits": jnp.zeros((1, 3, 4))}, {"logits": jnp.zeros((1, 5, 4))}
  >>> (values, where), _ = term.apply({}, {}, student, teacher, {}, step=0, key=None)
  >>> values.round(4)
  Array([0.], dtype=float32)
  """
  call = _prepare(loss, "all", None, hyperparameters)
  check_number("temperature", temperature, low=0, open_low=True)

  def sides(student, teacher):
    s, t = (
      outputs_of(outputs, output, side)
      for side, outputs in (("student", student), ("teacher", teacher))
    )
    check_frames(output, s, "student")
    check_frames(output, t, "teacher")
    if s.shape[0] != t.shape[0] or s.shape[-1] != t.shape[-1]:
      raise _classes_error(output, s.shape, t.shape)
    return s, t

  def init(key, student, teacher):
    del key
    check_number("temperature", temperature, low=0, open_low=True)
    s, t = sides(student, teacher)
    mean = jax.ShapeDtypeStruct((s.shape[0], s.shape[-1]), jnp.float32)
    call.check(mean, mean, s.shape[:1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key, axis_name
    s, t = sides(student, teacher)
    shapes = s.shape[:2], t.shape[:2]
    counts = frame_counts(lengths, output, (student, teacher), shapes, batch)
    where = (counts.student > 0) & (counts.teacher > 0)
    where = where if counts.where is None else where & counts.where
    values = losses.ctc_mean(
      s,
      t,
      loss=call.at(step),
      temperature=at_step(temperature, step),
      student_where=is_valid_frame(counts.student, s.shape[1]) & where[:, None],
      teacher_where=is_valid_frame(counts.teacher, t.shape[1]) & where[:, None],
    )
    return (jnp.where(counts.outside, jnp.nan, values), where | counts.outside), state

  return Term(init, apply)


def _prepare(
  loss: Callable, mode: str, blank: int | None, hyperparameters: dict[str, Any]
) -> LossCall:
  """Returns the call of a loss of frames, with `mode` and `blank` where it has such arguments."""
  if mode not in MODES:
    raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
  call = prepare(loss, hyperparameters)
  if call.step_arguments:
    reads = " and ".join(sorted(call.step_arguments))
    raise ValueError(
      f"loss: expected one value a frame of two networks' logits, got {name_of(loss)}, which takes "
      f"{reads}: frames have no labels of their own; use one such as losses.kl_divergence"
    )
  parameters = inspect.signature(loss).parameters
  own = {name: x for name, x in {"mode": mode, "blank": blank}.items() if name in parameters}
  if mode == "collapsed" and "mode" not in own:
    raise ValueError(
      f"mode: expected 'all' or 'nonblank' for {name_of(loss)}, got 'collapsed': that is "
      "frames(losses.ctc_frames, mode='collapsed')"
    )
  return prepare(loss, hyperparameters | own)


def _targets(teacher: Outputs, output: str, loss: Callable) -> SparseTargets:
  """Returns what a cached teacher stores of its classes."""
  targets = any_output_of(teacher, output, "teacher")
  if not isinstance(targets, SparseTargets):
    raise ValueError(
      f"{output}: expected SparseTargets of a cached teacher for {name_of(loss)}, got all classes: "
      "use a loss of logits such as losses.kl_divergence"
    )
  return targets


def _frames_shape(t: Any) -> tuple[int, ...]:
  return tuple((t.log_probs if isinstance(t, SparseTargets) else t).shape[:2])


def _compared(counts: Counts, resample: bool) -> jax.Array:
  """Returns how many of the student's frames are compared, int [B]."""
  if resample:
    return jnp.where(counts.teacher > 0, counts.student, 0)
  return jnp.minimum(counts.student, counts.teacher)


def _resampled(t: jax.Array, counts: Counts, length: int) -> jax.Array:
  """Returns logits [B, length, V] of the teacher's probabilities at the student's frames."""
  z = t.astype(reduce.common_dtype(t.dtype, jnp.float32))
  z = jnp.where(is_valid_frame(counts.teacher, t.shape[1])[..., None], z, 0)
  resized = resize_sequence(jax.nn.softmax(z), counts.teacher, counts.student, length)
  return jnp.log(jnp.maximum(resized, _LEAST))


def _is_blank(t: Any, blank: int) -> jax.Array:
  """Returns where the teacher's most probable class is the blank, bool [B, T]."""
  if isinstance(t, SparseTargets):
    best = jnp.argmax(t.log_probs, -1)[..., None]
    return jnp.take_along_axis(t.indices, best, -1)[..., 0] == blank
  return losses.is_blank_frame(t, blank=blank)


@contextlib.contextmanager
def _naming_classes(output: str, s: Any, t: Any) -> Iterator[None]:
  """Shows both shapes where a loss rejects two alphabets."""
  try:
    yield
  except (ValueError, TypeError) as error:
    if isinstance(t, SparseTargets) or s.shape[-1] == t.shape[-1]:
      raise
    raise _classes_error(output, s.shape, t.shape) from error


def _classes_error(output: str, s: tuple[int, ...], t: tuple[int, ...]) -> ValueError:
  return ValueError(
    f"{output}: expected rows and classes of both networks to be equal, got {list(s)} of the "
    f"student and {list(t)} of the teacher: frames are compared class by class; for two alphabets "
    "use frames(losses.uld), or train on the teacher's transcripts (cache.seq_kd)"
  )
