"""Compares the heads of two detectors location by location, where the teacher is confident."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.objectives.calls import blank, outputs_of, prepare
from distill_jax.objectives.confidence import check_scores, confidence
from distill_jax.objectives.loss_checks import name_of
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def locations(
  loss: Callable[..., jax.Array],
  *,
  output: str,
  scores: str = "class_logits",
  background: bool = False,
  **hyperparameters: Any,
) -> Term:
  """Compares the heads of two detectors location by location, weighted by the teacher's confidence.

      locations(losses.binary_kl, output="class_logits")  # RetinaNet, YOLO
      locations(losses.kl_divergence, output="class_logits", background=True)  # SSD
      locations(losses.localization, output="box_bins")  # YOLO

  One value an image: the sum over the locations of confidence times loss, over the sum of the
  confidences. The confidence is the teacher's largest probability of a class. Most locations are
  background, which would outweigh the objects in a plain mean (Mehta & Ozturk 2018,
  arXiv:1805.06361, scale by the teacher's objectness).

  Args:
    loss: `(student [B, A, ...], teacher [B, A, ...], **hyperparameters) -> [B, A]`.
    output: name of the output of both heads, [B, A, ...]: A locations, those of the levels one
      after another, with the same strides and anchors in both networks.
    scores: name of the teacher's class logits [B, A, C].
    background: the last class is the background: probabilities are a softmax over all classes, and
      the confidence is that of the others. False: probabilities are sigmoids.
    **hyperparameters: passed to the loss; numbers, or schedules of the step.

  Raises:
    ValueError: at once, a loss that is no function, relates rows or reads labels, or a
      hyper-parameter that it does not have; in init, outputs or scores of other locations than the
      teacher's, or a loss without a value for each location.

  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> term = objectives.locations(losses.binary_kl, output="class_logits")
  >>> student = {"class_logits": jnp.zeros((1, 2, 1))}
  >>> teacher = {"class_logits": jnp.array([[[3.0], [-3.0]]])}  # An object, and background.
  >>> (values, where), _ = term.apply({}, {}, student, teacher, {}, step=0, key=None)
  >>> values.shape
  (1,)
  """
  call = prepare(loss, hyperparameters)
  if call.step_arguments:
    raise ValueError(
      f"loss: expected one of (student, teacher) [B, A, ...], got {name_of(loss)}, which takes "
      f"{sorted(call.step_arguments)}: use one with a value for each location, such as "
      "losses.binary_kl"
    )

  def sides(student, teacher):
    s = outputs_of(student, output, "student")
    t = outputs_of(teacher, output, "teacher")
    confidences = outputs_of(teacher, scores, "teacher")
    _check_locations(output, s.shape, t.shape)
    check_scores(scores, confidences.shape, t.shape[:2], background)
    return s, t, confidences

  def check_values(shape, expected):
    if shape != expected:
      raise ValueError(
        f"loss: expected {name_of(loss)} to return a value for each location, {expected}, got "
        f"{shape}: use one such as losses.binary_kl or losses.localization"
      )

  def init(key, student, teacher):
    del key
    s, t, _ = sides(student, teacher)
    call.check(s, t, s.shape[:2])
    values = jax.eval_shape(call.at(jnp.zeros((), jnp.int32)), s, t)
    check_values(values.shape, s.shape[:2])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key
    s, t, logits = sides(student, teacher)
    value = call.value(s, t, batch, step, axis_name)
    values, where = value if isinstance(value, tuple) else (value, None)
    check_values(values.shape, s.shape[:2])
    weights = confidence(blank(where, logits), background=background)
    return (_weighted_mean(values, weights), where), state

  return Term(init, apply)


def _weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns the mean [B] of values [B, A] with weights >= 0; 0 where these are all 0."""
  weights = weights.astype(values.dtype)
  total = weights.sum(-1)
  return (values * weights).sum(-1) / jnp.where(total > 0, total, 1)


def _check_locations(output: str, s: tuple[int, ...], t: tuple[int, ...]) -> None:
  """Checks that two heads have the same locations and outputs of one shape."""
  if len(s) < 3 or len(t) < 3:
    raise ValueError(
      f"{output}: expected [B, A, ...] of both heads, got {tuple(s)} of the student and {tuple(t)} "
      "of the teacher: join the levels' outputs along axis 1"
    )
  if s == t:
    return
  hint = "select the student's classes with teachers.select_classes, or distill features"
  if s[2] > t[2]:
    hint = "the teacher lacks some of them: distill the neck with features, fgd or score_weighted"
  if s[1] != t[1]:
    hint = (
      "their grids or anchors differ, so that no location has a partner: distill the neck with "
      "features, fgd or score_weighted"
    )
  raise ValueError(
    f"{output}: expected one shape, got {tuple(s)} of the student and {tuple(t)} of the teacher: "
    f"{hint}"
  )
