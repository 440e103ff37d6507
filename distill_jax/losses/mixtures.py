"""Divergences to a mixture of teacher and student, bounded, and a mixture of both KLs.

In the formulas p = softmax(teacher / T), q = softmax(student / T); a mixture is the logaddexp of
log-probabilities.
"""

import jax
import jax.numpy as jnp
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

  DistiLLM-2's code detaches the mixture, which leaves the gradient of the first q only.

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


def adaptive_kl(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  head_mass: Scalar = 0.5,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 [g KL(p || q) + (1 - g) KL(q || p)], g the fraction of sum |p - q| on the teacher's head.

  The head is the fewest of the teacher's classes whose probabilities sum to `head_mass` or more.
  Both KLs are over all classes. g is a constant of the gradient (`stop_gradient`), as in the
  reference code.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    head_mass: probability of the head in (0, 1], may be traced.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]. inf where one side gives probability 0 to a class that the other
    believes possible.

  Raises:
    ValueError: shapes differ, temperature <= 0, or head_mass outside (0, 1].

  Compares: class probabilities, by KL and reverse KL where each is better
  Shapes: [..., C] -> [...]
  Use: language models, instead of a choice between kl_divergence and reverse_kl
  Weight: 1
  Source: AKL, Wu et al. 2024, arXiv:2404.02657

  >>> adaptive_kl(jnp.array([0., 0.]), jnp.array([0., jnp.log(3.)])).round(4)
  Array(0.1373, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  head_mass = _checks.number("head_mass", head_mass, log_q.dtype, low=0, high=1, open_low=True)
  p, q = (jnp.exp(jax.lax.stop_gradient(x)) for x in (log_p, log_q))
  order = jnp.argsort(p, -1, descending=True)
  p, q = (jnp.take_along_axis(x, order, -1) for x in (p, q))
  gap = jnp.abs(p - q)
  head = jnp.where(jnp.cumsum(p, -1) - p < head_mass, gap, 0).sum(-1)
  total = gap.sum(-1)
  fraction = head / jnp.where(total > 0, total, 1)
  # A KL that is infinite does not count where its factor is 0.
  forward = jnp.where(fraction > 0, fraction * _softmax.divergence(log_p, log_q), 0)
  reverse = jnp.where(fraction < 1, (1 - fraction) * _softmax.divergence(log_q, log_p), 0)
  return t**2 * (forward + reverse)
