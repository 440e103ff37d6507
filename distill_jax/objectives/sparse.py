"""Learns from a teacher of which K of V classes are stored."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from distill_jax import losses
from distill_jax.errors import check_integer
from distill_jax.losses import SparseTargets
from distill_jax.objectives.calls import any_output_of, batch_entry, outputs_of, prepare
from distill_jax.objectives.hyperparameters import check_number
from distill_jax.objectives.label_masks import make_label_mask
from distill_jax.objectives.label_settings import check_class_weights
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def sparse(
  loss: Callable[..., jax.Array],
  *,
  k: int | None = None,
  temperature: float | None = None,
  output: str = "logits",
  label: str = "label",
  ignore_label: int | None = None,
  class_weights: Sequence[float] | None = None,
  valid: str | None = None,
  **hyperparameters: Any,
) -> Term:
  """Compares the student's logits with `SparseTargets` of the teacher.

  A cached teacher's targets are used as they are stored. Of a live teacher's logits each step
  takes the top k or, for `losses.sampled_cross_entropy`, k random samples that are a function of
  the step and the batch's 'id'.

  Args:
    loss: `(student [..., V], targets, **hyperparameters) -> [...]`, one of `losses.sparse`.
      `sampled_cross_entropy` takes random samples, the others a top k.
    k: number of classes (or samples) of a live teacher. None: those of a cached one, however many.
    temperature: > 0, of a live teacher; None is 1. For a cached one None is the stored one.
    output: name of the output of both networks that holds the logits.
    label, ignore_label, class_weights: as in `logits`.
    valid: name of a bool entry of the batch that marks the values that count, in addition to
      'where': tokens [B, L].
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, k < 1, temperature <= 0 or a hyper-parameter that the loss does not have;
      in init, a live teacher without k, of fewer classes than k or of other rows or classes than
      the student, a cached one that stores another k or temperature, random samples for a loss of
      the most probable classes, or the reverse.

  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> term = objectives.sparse(losses.sparse_kl, k=2)
  >>> student, teacher = {"logits": jnp.zeros((2, 8))}, {"logits": jnp.eye(2, 8)}
  >>> (values, where), _ = term.apply({}, {}, student, teacher, {}, step=0, key=None)
  >>> values.shape
  (2,)
  """
  call = prepare(loss, hyperparameters, valid=valid)
  mask = make_label_mask(call, label, ignore_label, class_weights)
  if k is not None:
    check_integer("k", k, 1)
  if callable(temperature):
    raise ValueError(
      "temperature: expected a number, got a schedule: a teacher's K classes have one temperature; "
      "objectives.logits takes a schedule"
    )
  if temperature is not None:
    check_number("temperature", temperature, low=0, open_low=True)

  def targets_of(s, teacher, keys) -> SparseTargets:
    t = any_output_of(teacher, output, "teacher")
    if isinstance(t, SparseTargets):
      _check_stored(t, k, temperature, output)
      return t
    _check_live(t, s.shape, output)
    if k is None:
      raise ValueError(
        f"k: expected the number of classes to take of a live teacher's {output!r} "
        f"{tuple(t.shape)}, got None"
      )
    live_temperature = 1.0 if temperature is None else temperature
    if loss is not losses.sampled_cross_entropy:
      return losses.top_k(t, k, temperature=live_temperature)
    sample = functools.partial(losses.sample_k, k=k, temperature=live_temperature)
    return jax.vmap(sample)(keys(), t)

  def init(key, student, teacher):
    s = outputs_of(student, output, "student")
    targets = jax.eval_shape(
      lambda outputs: targets_of(s, outputs, lambda: jax.random.split(key, s.shape[0])), teacher
    )
    if mask is not None:
      check_class_weights(mask.class_weights, output, s.shape)
    call.check(s, targets, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params

    def keys():
      # By id, so that a row has the same samples on whichever device and position it is.
      return jax.vmap(jax.random.fold_in, (None, 0))(key, batch_entry(batch, "id"))

    s = outputs_of(student, output, "student")
    if mask is not None:
      _check_grid(label, batch_entry(batch, label).shape, s.shape)
    compute = call.value if mask is None else functools.partial(mask.value, call)
    return compute(s, targets_of(s, teacher, keys), batch, step, axis_name), state

  return Term(init, apply)


def _check_grid(name: str, label: tuple[int, ...], logits: tuple[int, ...]) -> None:
  """Raises a ValueError where label maps are on another grid than logits [B, ..., C]."""
  if len(label) == len(logits) - 1 > 2 and label[1:] != logits[1:-1]:
    raise ValueError(
      f"{name}: expected the logits' grid {logits[1:-1]}, got {label[1:]}: top classes of pixels "
      "have no values between them, so store the logits with cache.Dense(size=...) and use "
      "objectives.logits(resize=True)"
    )


def _check_stored(targets: SparseTargets, k, temperature, output: str) -> None:
  stored = targets.indices.shape[-1]
  if k not in (None, stored):
    raise ValueError(
      f"k: expected {stored}, the classes that the cached teacher stores of {output!r}, got {k}: "
      "leave k out"
    )
  if temperature not in (None, targets.temperature):
    raise ValueError(
      f"temperature: expected {targets.temperature}, the cached teacher's for {output!r}, got "
      f"{temperature}: leave temperature out, stored log-probabilities have no other one"
    )


def _check_live(t, shape: tuple[int, ...], output: str) -> None:
  if getattr(t, "shape", None) != shape:
    raise ValueError(
      f"{output}: expected SparseTargets of the teacher, or logits of the student's shape "
      f"{tuple(shape)}, got {getattr(t, 'shape', type(t).__name__)}"
    )
