"""Losses on logits: student [..., C] and teacher [..., C] give one value per example or token, [...].

In the formulas p = softmax(teacher / T), q = softmax(student / T). A class is missing where `class_mask` is
False or where both logits are -inf; a logit of -inf on one side is probability 0.
"""

import jax

from distill_jax.losses import _softmax


def kl_divergence(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """T^2 KL(p || q), the distillation loss.

  Many programs leave the factor T^2 out (then the gradient shrinks as 1/T^2) or average over the classes as
  well as over the batch (then the loss is C times too weak).

  Args:
    student: logits [..., C], any float dtype; computed in float32 or wider.
    teacher: logits of the same shape; -inf is probability 0.
    temperature: T > 0, may be traced. The factor T^2 keeps the gradient's size independent of T.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits (a padded vocabulary).

  Returns:
    Nats per example, [...], unreduced: `reduce.mean` applies example masks. inf where the student gives
    probability 0 to what the teacher believes possible.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities
  Shapes: [..., C] -> [...]
  Use: the default for classification and for language models
  Weight: 0.9 at T = 4, beside 0.1 x cross entropy
  Source: Hinton et al. 2015, section 2.1, arXiv:1503.02531

  >>> kl_divergence(jnp.array([1., 2.]), jnp.array([1., 2.]))
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(
    student, teacher, temperature=temperature, axis=axis, class_mask=class_mask
  )
  return t**2 * _softmax.divergence(log_p, log_q)


def soft_cross_entropy(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """-T^2 sum p log q: `kl_divergence` plus T^2 times the teacher's entropy.

  Its gradient for the student is that of `kl_divergence`; its value at student = teacher is not 0.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape; -inf is probability 0.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities
  Shapes: [..., C] -> [...]
  Use: where a source reports cross entropy; same gradient as kl_divergence
  Weight: as kl_divergence
  Source: Hinton et al. 2015, section 2, arXiv:1503.02531

  >>> soft_cross_entropy(jnp.array([0., 0.]), jnp.array([0., 0.])).round(4)
  Array(0.6931, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(
    student, teacher, temperature=temperature, axis=axis, class_mask=class_mask
  )
  return t**2 * _softmax.cross_entropy(log_p, log_q)
