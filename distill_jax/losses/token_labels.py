"""Losses of language models on logits and tokens: [..., V], [..., V] and tokens [...] give [...].

`labels` are integers, as in labels.py: a label that is no existing class gives NaN for its row. In
the formulas p = softmax(teacher / T), q = softmax(student / T), y = label.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar


def minifinetuning(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  threshold: Scalar = 0.2,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 KL(p' || q), p' = (1 - a) p + a 1_y: a teacher corrected just enough towards the label.

  Where another class is more probable than y, a = (max p - p_y + threshold) / (1 + max p - p_y):
  then p'_y is the largest by `threshold`. Else p'_y = min(p_y + threshold, 1). The teacher is the
  student before finetuning. ModelOpt's `MFTLoss` adds 1e-7 to the denominators.

  Args:
    student: logits [..., V].
    teacher: logits of the same shape.
    labels: integers [...], the tokens of the data.
    threshold: margin of the label in [0, 1], may be traced.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per token, [...]; not 0 at student = teacher.

  Raises:
    ValueError: shapes differ, labels are not integers, temperature <= 0, or threshold outside
      [0, 1].

  Compares: class probabilities, corrected by the label
  Shapes: [..., V], labels [...] -> [...]
  Use: finetuning a language model on few examples without forgetting, as its own teacher
  Weight: 1, as the only loss
  Source: MFT, Belcak et al. 2025, arXiv:2506.15702; default of ModelOpt

  >>> teacher = jnp.log(jnp.array([0.6, 0.4]))
  >>> student = jnp.log(jnp.array([0.4, 0.6]))  # p' is this, in which the label leads by 0.2
  >>> abs(minifinetuning(student, teacher, jnp.array(1))).round(6)
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  threshold = _checks.number("threshold", threshold, log_q.dtype, low=0, high=1)
  target = _softmax.one_hot(labels, log_q.shape)
  p_max = jnp.exp(log_p.max(-1))
  p_label = jnp.exp(_softmax.log_gather(log_p, target))
  rest = jnp.exp(_softmax.log_sum(jnp.where(target, -jnp.inf, log_p)))
  # scale is 1 - a. A label that leads gets at most the whole rest.
  leads = p_label >= p_max
  capped = jnp.maximum(rest - threshold, 0) / jnp.where(rest > 0, rest, 1)
  scale = jnp.where(leads, capped, (1 - threshold) / (1 + p_max - p_label))
  corrected_label = jnp.where(leads, p_label, scale * p_max) + threshold
  log_label, log_scale = (_log(x) for x in (jnp.minimum(corrected_label, 1), scale))
  corrected = jnp.where(target, log_label[..., None], log_p + log_scale[..., None])
  value = t**2 * _softmax.divergence(corrected, log_q)
  return _softmax.nan_at_invalid_labels(value, target, log_q)


def minillm_single_step(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  teacher_mixing: Scalar,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """w T^2 KL(q || p), w = q_y / (a p_y + (1 - a) q_y) for a token y sampled from that mixture.

  The single-step part of MiniLLM's policy gradient, computed over all tokens instead of the
  sampled one. w is a constant of the gradient (`stop_gradient`). The authors' code and TRL leave w
  out of this part, which is a = 0: samples of the student alone, for which it is `reverse_kl`.

  Args:
    student: logits [..., V].
    teacher: logits of the same shape.
    labels: integers [...], the sampled tokens.
    teacher_mixing: a in [0, 1), the teacher's fraction of the mixture that was sampled from (0.2
      in the paper), may be traced.
    temperature: T > 0, may be traced; the samples' too.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per token, [...]. inf where the teacher gives probability 0 to a class that the student
    believes possible.

  Raises:
    ValueError: shapes differ, labels are not integers, temperature <= 0, or teacher_mixing outside
      [0, 1).

  Compares: class probabilities, mode seeking, weighed by importance
  Shapes: [..., V], labels [...] -> [...]
  Use: language models on samples of the student mixed with its teacher
  Weight: 1 in addition to the long-range part (a policy gradient)
  Source: MiniLLM, Gu et al. 2024, section 2.2, arXiv:2306.08543

  >>> student, teacher = jnp.array([1., 2.]), jnp.array([2., 1.])
  >>> minillm_single_step(student, teacher, jnp.array(0), teacher_mixing=0.).round(4)
  Array(0.4621, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  a = _checks.number("teacher_mixing", teacher_mixing, log_q.dtype, low=0, high=1, open_high=True)
  target = _softmax.one_hot(labels, log_q.shape)
  log_p_y, log_q_y = (_softmax.log_gather(jax.lax.stop_gradient(x), target) for x in (log_p, log_q))
  possible = log_q_y != -jnp.inf
  log_weight = jnp.where(possible, log_q_y, 0) - _softmax.mixture(
    log_p_y, jnp.where(possible, log_q_y, 0), a
  )
  value = jnp.exp(log_weight) * t**2 * _softmax.divergence(log_q, log_p)
  return _softmax.nan_at_invalid_labels(value, target, log_q)


def _log(x: jax.Array) -> jax.Array:
  """Returns log x; -inf with a zero gradient at 0."""
  return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)
