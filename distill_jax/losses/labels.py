"""Losses on logits and labels: student [..., C], teacher [..., C] and labels [...] give [...].

Labels are integers: mixed labels (mixup, cutmix) have no target class. A label that is no existing
class gives NaN for its row, which the train step reports; a row masked out of the mean (an ignore
label) may have any label. In the formulas p = softmax(teacher / T), q = softmax(student / T), y =
label.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar


def dkd(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  alpha: Scalar = 1.0,
  beta: Scalar = 8.0,
  temperature: Scalar = 4.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 [alpha KL(target vs rest) + beta KL(among the non-target classes)], decoupled distillation.

  At alpha = 1 and beta = 1 - p_y it is `kl_divergence`. The reference code warms beta's term up
  over the first 20 epochs and computes it by subtracting 1000 from the target's logit; here the
  class is removed.

  Args:
    student: logits [..., C], C > 2.
    teacher: logits of the same shape.
    labels: integers [...].
    alpha: weight >= 0 of the target term, may be traced.
    beta: weight >= 0 of the non-target term, may be traced.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, labels are not integers, 2 classes (the second term is constant),
      temperature <= 0, or a negative weight.

  Compares: target confidence, and the other classes among themselves
  Shapes: [..., C], labels [...] -> [...]
  Use: classification with a confident teacher and many classes
  Weight: 1 in addition to cross entropy, with beta 8 (CIFAR-100), 0.5 to 2 (ImageNet)
  Source: DKD, Zhao et al. 2022, equation 7, arXiv:2203.08679

  >>> dkd(jnp.array([1., 2., 3.]), jnp.array([1., 2., 3.]), jnp.array(2))
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  if log_q.shape[-1] <= 2:
    raise ValueError(
      f"student: expected more than 2 classes, got {log_q.shape[-1]}: the second term is constant"
    )
  alpha = _checks.number("alpha", alpha, log_q.dtype, low=0)
  beta = _checks.number("beta", beta, log_q.dtype, low=0)
  target = _softmax.one_hot(labels, log_q.shape)
  binary_q, binary_p = (_log_binary(x, target) for x in (log_q, log_p))
  rest_q, rest_p = _log_rest(student, teacher, target, t, axis, class_mask)
  among = _softmax.divergence(rest_p, rest_q)
  value = alpha * _softmax.divergence(binary_p, binary_q) + beta * among
  return _softmax.nan_at_invalid_labels(t**2 * value, target, log_q)


def nkd(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  gamma: Scalar = 1.5,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """-p_y log q_y at T = 1, minus gamma T^2 sum_{j != y} p^_j log q^_j, p^ and q^ renormalized at T.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    labels: integers [...].
    gamma: weight >= 0 of the non-target term, may be traced.
    temperature: T > 0 of the non-target term, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]; not 0 at student = teacher (both terms are cross entropies).

  Raises:
    ValueError: shapes differ, labels are not integers, temperature <= 0, or gamma < 0.

  Compares: target confidence, and the other classes among themselves
  Shapes: [..., C], labels [...] -> [...]
  Use: classification, as dkd with one scale less to tune
  Weight: 1 in addition to cross entropy
  Source: NKD, Yang et al. 2023, arXiv:2303.13005

  >>> nkd(jnp.array([0., 0.]), jnp.array([0., 0.]), jnp.array(1)).round(4)
  Array(0.3466, dtype=float32)
  """
  log_q, log_p, _ = _softmax.log_pair(student, teacher, axis=axis, class_mask=class_mask)
  t = _checks.positive("temperature", temperature, log_q.dtype)
  gamma = _checks.number("gamma", gamma, log_q.dtype, low=0)
  target = _softmax.one_hot(labels, log_q.shape)
  rest_q, rest_p = _log_rest(student, teacher, target, t, axis, class_mask)
  hard = _softmax.cross_entropy(*(jnp.where(target, x, -jnp.inf) for x in (log_p, log_q)))
  value = hard + gamma * t**2 * _softmax.cross_entropy(rest_p, rest_q)
  return _softmax.nan_at_invalid_labels(value, target, log_q)


def wsld(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  temperature: Scalar = 2.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 (1 - exp(-CE_s / (CE_t + 1e-7))) CE(p, q): less weight where the student is already better.

  CE_s and CE_t are the cross entropies of student and teacher against the label at T = 1. The
  weight is a constant of the gradient (`stop_gradient`), as in the reference code.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    labels: integers [...].
    temperature: T > 0 of the soft labels, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, labels are not integers, or temperature <= 0.

  Compares: class probabilities, weighted by the example
  Shapes: [..., C], labels [...] -> [...]
  Use: classification with many hard examples
  Weight: 2.5 in addition to cross entropy
  Source: WSLD, Zhou et al. 2021, arXiv:2102.00650

  >>> wsld(jnp.array([0., 0.]), jnp.array([0., 0.]), jnp.array(1)).round(2)
  Array(1.75, dtype=float32)
  """
  log_q, log_p, _ = _softmax.log_pair(student, teacher, axis=axis, class_mask=class_mask)
  soft_q, soft_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  soft = t**2 * _softmax.cross_entropy(soft_p, soft_q)
  target = _softmax.one_hot(labels, log_q.shape)
  ce_s, ce_t = (-_softmax.log_gather(jax.lax.stop_gradient(x), target) for x in (log_q, log_p))
  ratio = jnp.where(ce_t == jnp.inf, 0, ce_s / (jnp.where(ce_t == jnp.inf, 0, ce_t) + 1e-7))
  return _softmax.nan_at_invalid_labels(-jnp.expm1(-ratio) * soft, target, log_q)


def ofa(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  eps: Scalar,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """-[(1 + p_y)^eps - 1] log q_y - sum_{c != y} p_c log q_c: a target raised by its confidence.

  eps = 1 is `soft_cross_entropy`. The paper raises the target's factor only; the reference code
  writes -sum_c [(p_c + 1_{c = y})^eps - 1_{c = y}] log q_c, which raises every class. The paper's
  formula has no "- 1": it includes the cross entropy with the label, which is another term here, as
  in the code.

  Args:
    student: logits [..., C] of a branch or of the full student.
    teacher: logits of the same shape.
    labels: integers [...].
    eps: exponent >= 1, may be traced; 1 to 1.5 in the paper.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, labels are not integers, or eps < 1.

  Compares: class probabilities with an enhanced target
  Shapes: [..., C], labels [...] -> [...]
  Use: teacher and student of different families, through branches at several stages
  Weight: 1 in addition to cross entropy, for the student and for each branch
  Source: OFA-KD, Hao et al. 2023, arXiv:2310.19444

  >>> ofa(jnp.array([0., 0.]), jnp.array([0., 0.]), jnp.array(1), eps=1).round(4)
  Array(0.6931, dtype=float32)
  """
  log_q, log_p, _ = _softmax.log_pair(student, teacher, axis=axis, class_mask=class_mask)
  eps = _checks.number("eps", eps, log_q.dtype, low=1)
  target = _softmax.one_hot(labels, log_q.shape)
  # (1 + p)^eps - 1, exact where p is small.
  raised = jnp.expm1(eps * jnp.log1p(jnp.exp(_softmax.log_gather(log_p, target))))
  value = _softmax.weighted_cross_entropy(
    jnp.where(target, raised[..., None], jnp.exp(log_p)), log_q
  )
  return _softmax.nan_at_invalid_labels(value, target, log_q)


def _log_binary(log_q: jax.Array, target: jax.Array) -> jax.Array:
  """Returns log-probabilities [..., 2] of the target's class and of all others together."""
  rest = _softmax.log_sum(jnp.where(target, -jnp.inf, log_q))
  return jnp.stack([_softmax.log_gather(log_q, target), rest], -1)


def _log_rest(
  student: ArrayLike,
  teacher: ArrayLike,
  target: jax.Array,
  temperature: Scalar,
  axis: int,
  class_mask: ArrayLike | None,
) -> list[jax.Array]:
  """Returns log-probabilities of student and teacher among all classes but the target's.

  From the logits: log-probabilities of all classes have lost digits where the target's dominates.
  """
  pair = _softmax.logit_pair(student, teacher, axis, class_mask)
  return [_softmax.log_softmax(z, mask=~target, temperature=temperature) for z in pair]
