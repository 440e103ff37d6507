"""Terms for language models, from hidden states and heads, without logits [tokens, vocabulary]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.losses import SparseTargets
from distill_jax.objectives.calls import (
  any_output_of,
  has_true_label,
  label_of,
  outputs_of,
  valid_rows,
)
from distill_jax.objectives.hyperparameters import Number, at_step, check_at_steps
from distill_jax.objectives.terms import Term
from distill_jax.objectives.token_checks import (
  CACHED,
  LIVE,
  check_arguments,
  check_cached,
  check_live,
  check_no_teacher,
)
from distill_jax.types import Batch, Outputs, Variables

STATES = ("hidden", "head")


def tokens(
  loss: Callable[..., jax.Array] | None = losses.kl_divergence,
  *,
  label_weight: Number = 0.0,
  temperature: Number | None = None,
  memory: int | None = None,
  targets: str = "logits",
  **options: Any,
) -> Term:
  """Compares student and teacher at every token with a label, and adds the labels' cross entropy.

      tokens(losses.kl_divergence, label_weight=0.25)  # a live teacher
      tokens(losses.sparse_kl, label_weight=0.25)  # the top k of a cached one
      tokens(None)  # labels only

  Both networks give 'hidden' [B, L, width] and 'head' = (kernel [width, V], bias, softcap)
  (`models.llm.decoder`). The output `targets` of a cached teacher is `SparseTargets` [B, L, K]
  instead. The fused `linear_*` losses compute the same values as `loss` does from logits.

  The batch's 'label' is the next token, int [B, L]; where it is negative (padding, the end of a
  document) a token does not count. The mean is over the tokens of the global batch that count,
  however they are padded, packed, sharded or accumulated; it is 0 where none counts. Rows that the
  batch marks as 'generated' (bool [B], `models.llm.on_policy`) have no true labels: their cross
  entropy is 0, in the same mean.

  Args:
    loss: of a live teacher `losses.kl_divergence`, `reverse_kl`, `jensen_shannon`, `skew_kl` or
      `skew_reverse_kl`; of a cached one `losses.sparse_kl`, `sparse_kl_conditional` or
      `sampled_cross_entropy`. None: the labels only, as `next_tokens`.
    label_weight: weight of the labels' cross entropy, which is computed in the same pass over the
      vocabulary; a number >= 0 or a schedule of the step.
    temperature: > 0 or a schedule of the step, of a live teacher; None is 1. For a cached one None
      is the stored one.
    memory: number of bytes that temporaries may take; None: 64 MiB.
    targets: name of the cached teacher's output, such as 'logits@top8' where a cache stores
      several. Losses of a live teacher read the hidden states of a cache that stores them.
    **options: hyper-parameters of the loss, such as `class_mask` or `alpha`; a function for a
      number is a schedule of the step.

  Raises:
    ValueError: at once, another loss, an option that it does not have, or a label_weight,
      temperature or memory out of range; in init, an option out of range, hidden states, heads or
      targets that are missing or do not fit, a loss that is not for such a teacher, another
      temperature than a cached teacher's, or vocabularies that differ.

  >>> from distill_jax import losses, objectives
  >>> term = objectives.tokens(losses.kl_divergence)
  >>> outputs = {"hidden": jnp.ones((1, 2, 4)), "head": (jnp.eye(4), None, None)}
  >>> batch = {"label": jnp.array([[0, -1]])}
  >>> (values, where), _ = term.apply({}, {}, outputs, outputs, batch, step=0, key=None)
  >>> f"{values[0, 0]:.3f}", where.tolist()  # equal networks; one token has a label
  ('0.000', [[True, False]])
  """
  if loss is None:
    check_no_teacher(label_weight=label_weight, temperature=temperature, **options)
    return next_tokens(memory=memory)
  schedules = check_arguments(loss, label_weight, temperature, memory, targets, options)

  def value(student, teacher, label, weights, label_weights, step, options):
    loss_kwargs = {"weights": weights, "memory": memory, **options}
    has_labels = callable(label_weight) or label_weight > 0
    if has_labels:
      loss_kwargs["labels"] = jnp.maximum(label, 0).reshape(-1)
      loss_kwargs["label_weights"] = label_weights * at_step(label_weight, step)
    stored = teacher.get(targets)
    is_live = loss in LIVE and "head" in teacher  # A cache may store hidden states as well.
    if isinstance(stored, SparseTargets) and not is_live:
      check_cached(loss, stored, temperature, targets)
      total = _cached_loss(student, stored, CACHED[loss], **loss_kwargs)
    else:
      check_live(loss)
      live_temperature = 1.0 if temperature is None else at_step(temperature, step)
      total = _live_loss(student, teacher, LIVE[loss], live_temperature, **loss_kwargs)
    return total[0] if has_labels else total

  def init(key, student, teacher):
    del key
    check_arguments(loss, label_weight, temperature, memory, targets, options)
    if targets not in teacher:
      any_output_of(teacher, "hidden" if targets == "logits" else targets, "teacher")
    names = (*STATES, targets)
    s, t = ({name: x[name] for name in names if name in x} for x in (student, teacher))
    label = jnp.zeros(outputs_of(student, "hidden", "student").shape[:2], int)
    ones, first = jnp.ones(label.size, jnp.float32), jnp.zeros((), int)

    def shapes(s, t, **options):
      return value(s, t, label, ones, ones, first, options)

    check_at_steps(shapes, options, schedules, s, t)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key, axis_name
    label, where = _counted(batch)
    weights = where.reshape(-1).astype(jnp.float32)
    label_weights = has_true_label(batch, where).reshape(-1).astype(jnp.float32)
    numbers = options | {name: at_step(options[name], step) for name in schedules}
    total = value(student, teacher, label, weights, label_weights, step, numbers)
    return _mean(total, where), state

  return Term(init, apply)


def next_tokens(*, memory: int | None = None) -> Term:
  """Cross entropy of the student with the next tokens, without a teacher.

  Outputs, labels, mean and `memory` as in `tokens`; rows that are 'generated' do not count.

  Raises:
    ValueError: in init, hidden states or a head that are missing.

  >>> from distill_jax import objectives
  >>> term = objectives.next_tokens()
  >>> outputs = {"hidden": jnp.ones((1, 2, 4)), "head": (jnp.eye(4), None, None)}
  >>> batch = {"label": jnp.array([[0, -1]])}
  >>> (values, where), _ = term.apply({}, {}, outputs, {}, batch, step=0, key=None)
  >>> f"{values[0, 0]:.3f}", where.tolist()  # log(4): four tokens are equally probable
  ('1.386', [[True, False]])
  """

  def init(key, student, teacher):
    del key, teacher
    for name in STATES:
      any_output_of(student, name, "student")
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, teacher, step, key, axis_name
    label, where = _counted(batch)
    where = has_true_label(batch, where)
    hidden, head = _flat(student, "student")
    total = losses.linear_cross_entropy(
      hidden,
      head,
      jnp.maximum(label, 0).reshape(-1),
      weights=where.reshape(-1).astype(jnp.float32),
      memory=memory,
    )
    return _mean(total, where), state

  return Term(init, apply)


def _cached_loss(student: Outputs, stored: SparseTargets, tail: str, **loss_kwargs: Any):
  """Returns the loss of a cached teacher's targets [B, L, K], summed over the tokens."""
  hidden, head = _flat(student, "student")
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stored)
  return losses.linear_sparse_kl(hidden, head, flat, tail=tail, **loss_kwargs)


def _live_loss(
  student: Outputs,
  teacher: Outputs,
  divergence: str,
  temperature: Any,
  **loss_kwargs: Any,
):
  """Returns the loss of a live teacher's hidden states, summed over the tokens."""
  hidden, head = _flat(student, "student")
  teacher_hidden, teacher_head = _flat(teacher, "teacher")
  vocabulary = head[0].shape[1]
  if teacher_head[0].shape[1] != vocabulary:
    raise ValueError(
      f"head: expected one vocabulary, got {teacher_head[0].shape[1]} tokens of the teacher and "
      f"{vocabulary} of the student: tokens are compared one by one; for two vocabularies give "
      "both networks an output 'logits' and use objectives.logits(losses.uld), or train on the "
      "teacher's text (cache.seq_kd)"
    )
  return losses.linear_kl(
    hidden,
    head,
    teacher_hidden,
    teacher_head,
    divergence=divergence,
    temperature=temperature,
    **loss_kwargs,
  )


def _flat(outputs: Outputs, side: str):
  """Returns the hidden states as [tokens, width], and the head."""
  hidden = outputs_of(outputs, "hidden", side)
  if hidden.ndim != 3:
    raise ValueError(
      f"hidden: expected [rows, tokens, width] of the {side}, got {tuple(hidden.shape)}"
    )
  return hidden.reshape(-1, hidden.shape[-1]), any_output_of(outputs, "head", side)


def _counted(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns the labels, and which tokens have one, both [B, L]."""
  label = label_of(batch)
  if label.ndim != 2 or not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"label: expected the next tokens, int [rows, tokens], got {label.dtype} {label.shape}"
    )
  return label, valid_rows(batch, label >= 0)


def _mean(total: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a sum over tokens as a term's value: at each of them their mean.

  The counts then add up over microbatches and devices as for other terms.
  """
  count = jnp.maximum(where.sum(dtype=total.dtype), 1)
  return jnp.broadcast_to(total / count, where.shape), where
