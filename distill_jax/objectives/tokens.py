"""Terms for language models, from hidden states and heads: no array of [tokens, vocabulary] is made."""

import inspect
import math

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.errors import suggest
from distill_jax.losses import SparseTargets
from distill_jax.objectives.calls import (
  any_output_of,
  has_true_label,
  label_of,
  outputs_of,
  valid_rows,
)
from distill_jax.objectives.terms import Term
from distill_jax.types import Batch, Variables

STATES = ("hidden", "head")


def tokens(
  divergence: str = "kl",
  *,
  label_weight: float = 0.0,
  temperature: float | None = None,
  memory: int | None = None,
  targets: str = "logits",
  **options,
) -> Term:
  """The divergence between student and teacher at every token that has a label, and the labels' own cross entropy.

  Both networks give 'hidden' [B, L, width] and 'head' = (kernel [width, V], bias, softcap) (`models.decoder`). A
  cached teacher may give `targets` kept as `SparseTargets` instead, [B, L, K].

  The batch's 'label' is the next token, int [B, L]; where it is negative (padding, the end of a document) a token
  counts in neither. The mean is over the tokens that count in the whole batch, however they are padded, packed,
  sharded or accumulated; it is 0 where none does. Rows that the batch calls 'generated' (bool [B]: the student wrote
  them, `models.on_policy`) have no true labels: there the cross entropy is 0, in the same mean.

  Args:
    divergence: 'kl', 'reverse_kl', 'jensen_shannon', 'skew_kl' or 'skew_reverse_kl' (`losses.linear_kl`) of a live
      teacher; 'bucket', 'conditional' or 'sampled' (`losses.linear_sparse_kl`'s tail) of a cached one.
    label_weight: of the cross entropy, added in the same pass over the vocabulary.
    temperature: of a live teacher, None is 1; of a cached one None is its own.
    memory: bytes that temporaries may take.
    targets: the name of a cached teacher's output, 'logits' or such as 'logits@top8' where a cache keeps several.
    **options: passed to the loss.

  Raises:
    ValueError: at once, a divergence or an option that there is not, or a number outside its range; in init, hidden
      states, heads or targets that are missing or do not fit, a divergence that is not for such a teacher, another
      temperature than a cached teacher's; vocabularies that differ.
  """
  if not (math.isfinite(label_weight) and label_weight >= 0):
    raise ValueError(f"label_weight: expected a finite number >= 0, got {label_weight}")
  if divergence not in (*losses.linear.DIVERGENCES, *losses.linear.TAILS):
    known = (*losses.linear.DIVERGENCES, *losses.linear.TAILS)
    raise ValueError(f"divergence: there is no {divergence!r}{suggest(divergence, known)}")
  _check_options(memory, options)
  extras = {"memory": memory, **options}

  def value(student, teacher, label, valid, true):
    hidden, (kernel, bias, softcap) = _flat(student, "student")
    if label_weight:
      extra = {"labels": jnp.maximum(label, 0).reshape(-1), "label_weights": label_weight * true}
    else:
      extra = {}
    kept = teacher.get(targets)
    if isinstance(kept, SparseTargets):
      if temperature not in (None, kept.temperature):
        raise ValueError(
          f"temperature: the cached teacher's {targets!r} has {kept.temperature}, got {temperature}: leave it out"
        )
      flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
      given = losses.linear_sparse_kl(
        hidden,
        kernel,
        flat,
        weights=valid,
        tail=divergence,
        bias=bias,
        softcap=softcap,
        **extra,
        **extras,
      )
    else:
      teacher_hidden, (teacher_kernel, teacher_bias, teacher_softcap) = _flat(teacher, "teacher")
      if teacher_kernel.shape[1] != kernel.shape[1]:
        raise ValueError(
          f"the teacher's vocabulary has {teacher_kernel.shape[1]} tokens and the student's {kernel.shape[1]}: "
          "tokens can be compared one by one only where both mean the same; `losses.uld` needs no equal ones"
        )
      given = losses.linear_kl(
        hidden,
        kernel,
        teacher_hidden,
        teacher_kernel,
        weights=valid,
        divergence=divergence,
        temperature=1.0 if temperature is None else temperature,
        student_bias=bias,
        teacher_bias=teacher_bias,
        student_softcap=softcap,
        teacher_softcap=teacher_softcap,
        **extra,
        **extras,
      )
    return given[0] if label_weight else given

  def init(key, student, teacher):
    del key
    if targets not in teacher:
      any_output_of(teacher, "hidden" if targets == "logits" else targets, "teacher")
    used = [{name: x[name] for name in (*STATES, targets) if name in x} for x in (student, teacher)]
    label = jax.ShapeDtypeStruct(outputs_of(student, "hidden", "student").shape[:2], jnp.int32)
    jax.eval_shape(lambda s, t, y: value(s, t, y, jnp.ones(y.size), jnp.ones(y.size)), *used, label)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, step, key, axis_name
    label, where = _counted(batch)
    weights = (x.reshape(-1).astype(jnp.float32) for x in (where, has_true_label(batch, where)))
    return _mean(value(student, teacher, label, *weights), where), state

  return Term(init, apply)


def next_tokens(*, memory: int | None = None) -> Term:
  """Cross entropy of the student with the next tokens: a language model alone.

  Outputs, labels, mean and `memory` as in `tokens`; rows that are 'generated' do not count.

  Raises:
    ValueError: in init, hidden states or a head that are missing.
  """

  def init(key, student, teacher):
    del key, teacher
    for name in STATES:
      any_output_of(student, name, "student")
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, teacher, step, key, axis_name
    label, where = _counted(batch)
    where = has_true_label(batch, where)
    hidden, (kernel, bias, softcap) = _flat(student, "student")
    weights, label = where.reshape(-1).astype(jnp.float32), jnp.maximum(label, 0).reshape(-1)
    total = losses.linear_cross_entropy(
      hidden, kernel, label, weights=weights, bias=bias, softcap=softcap, memory=memory
    )
    return _mean(total, where), state

  return Term(init, apply)


def _check_options(memory: int | None, options) -> None:
  if memory is not None and memory < 1:
    raise ValueError(f"memory: expected a number of bytes >= 1, got {memory}")
  known = {
    *inspect.signature(losses.linear_kl).parameters,
    *inspect.signature(losses.linear_sparse_kl).parameters,
  }
  for name in options:
    if name not in known:
      raise ValueError(
        f"{name}: neither linear_kl nor linear_sparse_kl has it{suggest(name, known)}"
      )


def _flat(outputs, whose: str):
  """Hidden states as [tokens, width], and the head."""
  hidden = outputs_of(outputs, "hidden", whose)
  if hidden.ndim != 3:
    raise ValueError(
      f"the {whose}'s 'hidden' {tuple(hidden.shape)}: expected [rows, tokens, width]"
    )
  return hidden.reshape(-1, hidden.shape[-1]), any_output_of(outputs, "head", whose)


def _counted(batch: Batch):
  """The labels, and which tokens have one."""
  label = label_of(batch)
  if label.ndim != 2 or not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"label: expected the next tokens, int [rows, tokens], got {label.dtype} {label.shape}"
    )
  return label, valid_rows(batch, label >= 0)


def _mean(total, where):
  """A sum over tokens as a term's value: at each of them their mean, so that counts add up as for other terms."""
  return jnp.broadcast_to(total / jnp.maximum(where.sum(), 1), where.shape), where
