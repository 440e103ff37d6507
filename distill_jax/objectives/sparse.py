"""Soft targets from a teacher of which K of V classes are kept."""

import math
from collections.abc import Callable

import jax

from distill_jax import losses
from distill_jax.losses import SparseTargets
from distill_jax.objectives.calls import any_output_of, batch_entry, outputs_of, prepare
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def sparse(
  loss: Callable[..., jax.Array],
  *,
  k: int | None = None,
  temperature: float | None = None,
  output: str = "logits",
  valid: str | None = None,
  **hyperparameters,
) -> Term:
  """A loss of `losses.sparse` between the student's logits and `SparseTargets` of the teacher.

  A cached teacher gives such targets, and they are used as they are. Of a live teacher's logits each step takes the top
  k or, for `losses.sampled_cross_entropy`, k draws that are a function of the step and the batch's 'id'.

  Args:
    loss: `(student [..., V], targets, **hyperparameters) -> [...]`. Cached draws are for `sampled_cross_entropy`
      alone, a cached top k for the others.
    k: classes (or draws) of a live teacher. None: a cached one's, whatever it keeps.
    temperature: of a live teacher; None is 1. Of a cached one None is its own.
    output: the output of both that holds the logits.
    valid: an entry of the batch, bool, that says which values count besides 'where': tokens [B, L].
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: at once, k < 1, temperature <= 0 or a hyper-parameter that the loss does not have; in init, a live
      teacher without k, of fewer classes than k or of other rows or classes than the student, and a cached one
      that keeps another k or another temperature, draws for a loss of the most probable classes, or these for a loss
      of draws.
  """
  call = prepare(loss, hyperparameters, valid=valid, several=True)
  if k is not None and k < 1:
    raise ValueError(f"k: expected an integer >= 1, got {k}")
  if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
    raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")

  def kept(s, teacher, keys) -> SparseTargets:
    t = any_output_of(teacher, output, "teacher")
    if isinstance(t, SparseTargets):
      _check_kept(t, k, temperature, output)
      return t
    if getattr(t, "shape", None) != s.shape:
      raise ValueError(
        f"teacher {output!r} {getattr(t, 'shape', type(t).__name__)} must be SparseTargets, or logits of the "
        f"student's shape {tuple(s.shape)}"
      )
    if k is None:
      raise ValueError(
        f"k: teacher {output!r} {tuple(t.shape)} is live: say how many classes to keep of it"
      )
    own = 1.0 if temperature is None else temperature
    if loss is not losses.sampled_cross_entropy:
      return losses.top_k(t, k, temperature=own)
    return jax.vmap(lambda key, z: losses.sample_k(key, z, k, temperature=own))(keys(), t)

  def init(key, student, teacher):
    s = outputs_of(student, output, "student")
    targets = jax.eval_shape(
      lambda outputs: kept(s, outputs, lambda: jax.random.split(key, s.shape[0])), teacher
    )
    call.check(s, targets, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, step
    s = outputs_of(student, output, "student")
    # By id, so that a row is drawn alike whichever device or position it has.
    targets = kept(
      s, teacher, lambda: jax.vmap(jax.random.fold_in, (None, 0))(key, batch_entry(batch, "id"))
    )
    return call.value(s, targets, batch, axis_name), state

  return Term(init, apply)


def _check_kept(targets: SparseTargets, k, temperature, output) -> None:
  stored = targets.indices.shape[-1]
  if k not in (None, stored):
    raise ValueError(
      f"k: the cached teacher {output!r} keeps {stored} of its classes, got {k}: leave k out"
    )
  if temperature not in (None, targets.temperature):
    raise ValueError(
      f"temperature: the cached teacher {output!r} is kept at {targets.temperature}, got {temperature}: its "
      "log-probabilities have no other one; leave temperature out"
    )
