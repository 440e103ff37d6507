"""Losses on the frames of networks that are trained by connectionist temporal classification (CTC).

A frame's classes are the labels and the blank. CTC itself is `objectives.ctc`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar
from distill_jax.losses.logits import kl_divergence

MODES = ("all", "nonblank", "collapsed")


def ctc_frames(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  blank: int = 0,
  mode: str = "all",
  temperature: Scalar = 1.0,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 KL(p || q) per frame, with the blank handled in one of three ways.

  - 'all': `kl_divergence` of every frame.
  - 'nonblank': 0 at frames whose most probable class of the teacher is the blank (blank
    elimination). The mean belongs to the other frames (`is_blank_frame`); `objectives.frames`
    takes it over them.
  - 'collapsed': at frames whose most probable class is the blank, the labels are collapsed to one
    class: KL over (blank, any label). The other frames compare all classes.

  Frames count equally, although most are blank. Takashima et al. found that frames alone may hurt
  where the spikes of the two networks are at other times; Hilmes et al. find that blank elimination
  needs a CTC term, and 'all' does not. 'collapsed' is the collapse that Panchapagesan et al. 2021
  (`rnnt_three_way`) do at every lattice node; for frames there is no published code.

  Args:
    student: logits [..., C], any float dtype; computed in float32 or wider.
    teacher: logits of the same shape; -inf is probability 0.
    blank: class of the blank.
    mode: 'all', 'nonblank' or 'collapsed'.
    temperature: T > 0, may be traced. Sources take 1 and no factor T^2.
    class_mask: classes that exist, bool, broadcastable to the logits (a padded vocabulary).

  Returns:
    Nats per frame, [...], unreduced: `reduce.mean` applies the mask of padded frames.

  Raises:
    ValueError: shapes differ, temperature <= 0, another mode, or blank is outside [0, C).

  Compares: class probabilities of each frame, the blank apart
  Shapes: [..., C] -> [...]
  Use: CTC networks for speech or text in pictures, of one frame rate and one alphabet
  Weight: 0.25 to 1, in addition to (1 - weight) x CTC
  Source: Takashima et al. 2018 (ICASSP); Hilmes et al. 2025, arXiv:2506.01503

  >>> student, teacher = jnp.zeros((2, 3)), jnp.array([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
  >>> ctc_frames(student, teacher, mode="nonblank").round(1)  # the first frame is blank
  Array([0. , 1.1], dtype=float32)
  """
  if mode not in MODES:
    raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, class_mask=class_mask)
  check_blank(blank, log_p.shape[-1])
  values = _softmax.divergence(log_p, log_q)
  if mode == "all":
    return t**2 * values
  others: ArrayLike = 0
  if mode == "collapsed":
    others = _softmax.divergence(*(_blank_or_label(x, blank) for x in (log_p, log_q)))
  return t**2 * jnp.where(is_blank_frame(log_p, blank=blank), others, values)


def is_blank_frame(teacher: ArrayLike, *, blank: int = 0) -> jax.Array:
  """Returns at which frames the blank is the most probable class; ties go to the first class.

  Args:
    teacher: logits [..., C].
    blank: class of the blank.

  Returns:
    bool [...].

  >>> is_blank_frame(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
  Array([ True, False], dtype=bool)
  """
  return jnp.argmax(teacher, -1) == blank


def ctc_mean(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  loss: Callable[[jax.Array, jax.Array], jax.Array] = kl_divergence,
  temperature: Scalar = 1.0,
  student_where: ArrayLike | None = None,
  teacher_where: ArrayLike | None = None,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 loss(log <q>, log <p>), <.> the mean over valid frames of softmax(logits / T).

  A row's mean distribution says which classes occur and how often, not when: the two networks may
  have other frame rates, and spikes at other times. PP-OCRv4's `KLCTCLogits` takes T = 0.5 without
  the factor T^2: weight 4 here is its 1. It adds 1e-6 to probabilities; here they are logarithms.

  Args:
    student: logits [B, S, C].
    teacher: logits [B, T, C]; the numbers of frames may differ.
    loss: `(student [B, C], teacher [B, C]) -> [B]` of logits: one of `losses` with its
      hyper-parameters bound by functools.partial.
    temperature: T > 0 of the frames' softmax, may be traced.
    student_where: valid frames, bool [B, S]; None: all. Those that are not may be NaN.
    teacher_where: valid frames of the teacher, bool [B, T].
    class_mask: classes that exist, bool, broadcastable to both logits.

  Returns:
    [B]; 0 for a row without a valid frame.

  Raises:
    ValueError: rows or numbers of classes differ, temperature <= 0, or a mask of another shape.

  Compares: class probabilities averaged over the frames
  Shapes: [B, S, C], [B, T, C] -> [B]
  Use: text in pictures, and networks whose spikes are at other times
  Weight: 4 at T = 0.5, in addition to 1 x CTC (PP-OCRv4's 1)
  Source: PP-OCRv4, PaddleOCR's KLCTCLogits, mode 'mean'

  >>> spikes = 9 * jnp.eye(3)[None]
  >>> ctc_mean(spikes, spikes[:, ::-1])  # the same classes at other times
  Array([0.], dtype=float32)
  """
  student, teacher = (
    _checks.array(name, x, exactly=3) for name, x in (("student", student), ("teacher", teacher))
  )
  if (len(student), student.shape[-1]) != (len(teacher), teacher.shape[-1]):
    raise ValueError(
      f"student: expected the teacher's rows and classes, got student {student.shape} and teacher "
      f"{teacher.shape}: only the numbers of frames may differ"
    )
  student, teacher = _checks.same_dtype(student, teacher)
  _softmax.check_classes(student)
  t = _checks.positive("temperature", temperature, student.dtype)
  masks = {"student_where": (student_where, student), "teacher_where": (teacher_where, teacher)}
  log_q, log_p = (
    _log_mean(z, _checks.mask(name, where, z.shape[:2]), t, class_mask)
    for name, (where, z) in masks.items()
  )
  has_both = (log_q.max(-1) > -jnp.inf) & (log_p.max(-1) > -jnp.inf)
  log_q, log_p = (jnp.where(has_both[:, None], x, 0) for x in (log_q, log_p))
  return t**2 * jnp.where(has_both, loss(log_q, log_p), 0)


def check_blank(blank: int, classes: int) -> None:
  """Raises ValueError where the blank is no class."""
  if not 0 <= blank < classes:
    raise ValueError(f"blank: expected a class in [0, {classes}), got {blank}")


def _blank_or_label(log_a: jax.Array, blank: int) -> jax.Array:
  """Returns log-probabilities [..., 2] of the blank and of any label."""
  is_blank = jnp.arange(log_a.shape[-1]) == blank
  is_blank = is_blank.reshape((1,) * (log_a.ndim - 1) + (-1,))
  label = _softmax.log_sum(jnp.where(is_blank, -jnp.inf, log_a))
  return jnp.stack([log_a[..., blank], label], -1)


def _log_mean(
  z: jax.Array, where: jax.Array | None, temperature: Scalar, class_mask: ArrayLike | None
) -> jax.Array:
  """Returns log of the mean probabilities [B, C] of logits [B, T, C]; -inf without a frame."""
  if where is not None:
    z = jnp.where(where[..., None], z, 0)
  mask = _checks.mask("class_mask", class_mask, z.shape)
  log_p = _softmax.log_softmax(z, mask=mask, temperature=temperature)
  if where is None:
    return _softmax.log_sum(log_p.swapaxes(1, 2)) - jnp.log(z.shape[1])
  log_p = jnp.where(where[..., None], log_p, -jnp.inf)
  count = jnp.maximum(where.sum(1, keepdims=True, dtype=z.dtype), 1)
  return _softmax.log_sum(log_p.swapaxes(1, 2)) - jnp.log(count)
