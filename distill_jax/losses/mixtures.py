"""Divergences to a mixture of teacher and student: bounded, or with bounded gradients.


In the formulas p = softmax(teacher / T), q = softmax(student / T); a mixture is the logaddexp of
log-probabilities.
"""

import jax
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar


def jensen_shannon(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  teacher_weight: Scalar = 0.5,
  temperature: Scalar = 1.0,
  normalize: bool = False,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 [w KL(p || m) + (1 - w) KL(q || m)] with m = w p + (1 - w) q.

  w is the teacher's weight: TRL's `beta` is w, DistiLLM's `lambda` is 1 - w. At 0.5 they are equal.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    teacher_weight: w in (0, 1), may be traced.
    temperature: T > 0, may be traced.
    normalize: divide by w (1 - w): then w -> 0 tends to KL(p || q) and w -> 1 to KL(q || p), as in
      GKD.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]; at most T^2 log 2 unless normalized, also where probabilities are 0.

  Raises:
    ValueError: shapes differ, temperature <= 0, or teacher_weight outside (0, 1).

  Compares: class probabilities, bounded, between KL and reverse KL
  Shapes: [..., C] -> [...]
  Use: language models on samples of the student
  Weight: 1
  Source: GKD, Agarwal et al. 2024, arXiv:2306.13649

  >>> jensen_shannon(jnp.array([0., -jnp.inf]), jnp.array([-jnp.inf, 0.])).round(4)
  Array(0.6931, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  w = _checks.number(
    "teacher_weight", teacher_weight, log_q.dtype, low=0, high=1, open_low=True, open_high=True
  )
  log_m = _softmax.mixture(log_p, log_q, w)
  value = w * _softmax.divergence(log_p, log_m) + (1 - w) * _softmax.divergence(log_q, log_m)
  return t**2 * (value / (w * (1 - w)) if normalize else value)


def skew_kl(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  alpha: Scalar = 0.1,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 KL(p || a p + (1 - a) q): KL whose gradient stays bounded where the student is far off.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    alpha: a in [0, 1), the teacher's fraction of the mixture; 0 is `kl_divergence`. May be traced.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]; at most T^2 log(1 / a).

  Raises:
    ValueError: shapes differ, temperature <= 0, or alpha outside [0, 1).

  Compares: class probabilities, bounded
  Shapes: [..., C] -> [...]
  Use: language models, instead of kl_divergence
  Weight: 1
  Source: DistiLLM, Ko et al. 2024, arXiv:2402.03898

  >>> skew_kl(jnp.array([0., -jnp.inf]), jnp.array([-jnp.inf, 0.]), alpha=0.5).round(4)
  Array(0.6931, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  a = _checks.number("alpha", alpha, log_q.dtype, low=0, high=1, open_high=True)
  return t**2 * _softmax.divergence(log_p, _softmax.mixture(log_p, log_q, a))


def skew_reverse_kl(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  alpha: Scalar = 0.1,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 KL(q || (1 - a) p + a q); the gradient flows through the mixture too.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    alpha: a in [0, 1), the student's fraction of the mixture; 0 is `reverse_kl`. May be traced.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]; at most T^2 log(1 / a).

  Raises:
    ValueError: shapes differ, temperature <= 0, or alpha outside [0, 1).

  Compares: class probabilities, mode seeking, bounded
  Shapes: [..., C] -> [...]
  Use: language models on samples of the student
  Weight: 1
  Source: DistiLLM, Ko et al. 2024, arXiv:2402.03898

  >>> skew_reverse_kl(jnp.array([0., -jnp.inf]), jnp.array([-jnp.inf, 0.]), alpha=0.5).round(4)
  Array(0.6931, dtype=float32)
  """
  return skew_kl(
    teacher, student, alpha=alpha, temperature=temperature, axis=axis, class_mask=class_mask
  )
