"""Losses on logits: student [..., C] and teacher [..., C] give one value a row, [...].

A row is an example or a token.

In the formulas p = softmax(teacher / T), q = softmax(student / T). A class is missing where
`class_mask` is False or where both logits are -inf; a logit of -inf on one side is probability 0.
Losses that also take the label are in labels.py.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar


def kl_divergence(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 KL(p || q), the distillation loss.

  Many programs leave the factor T^2 out (then the gradient shrinks as 1/T^2) or average over the
  classes as well as over the batch (then the loss is C times too weak). Keras' loss of this name
  takes probabilities and clips them at 1e-7, which hides the teacher's rarest classes.

  Args:
    student: logits [..., C], any float dtype; computed in float32 or wider.
    teacher: logits of the same shape; -inf is probability 0.
    temperature: T > 0, may be traced. The factor T^2 keeps the gradient's size independent of T.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits (a padded vocabulary).

  Returns:
    Nats per example, [...], unreduced: `reduce.mean` applies example masks. inf where the student
    gives probability 0 to a class that the teacher believes possible.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities
  Shapes: [..., C] -> [...]
  Use: the default for classification, segmentation (per pixel) and language models
  Weight: 0.9 at T = 4, in addition to 0.1 x cross entropy
  Source: Hinton et al. 2015, section 2.1, arXiv:1503.02531

  >>> kl_divergence(jnp.array([1., 2.]), jnp.array([1., 2.]))
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  return t**2 * _softmax.divergence(log_p, log_q)


def reverse_kl(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """T^2 KL(q || p): the student avoids the teacher's unlikely classes, and may cover one mode only.

  MiniLLM takes it over sequences that the student samples; per token it is this function.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]. inf where the teacher gives probability 0 to a class that the student
    believes possible.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities, mode seeking
  Shapes: [..., C] -> [...]
  Use: a student too small to cover all of the teacher, mostly language models
  Weight: 1
  Source: MiniLLM, Gu et al. 2024, arXiv:2306.08543

  >>> reverse_kl(jnp.array([1., 2.]), jnp.array([2., 1.])).round(4)
  Array(0.4621, dtype=float32)
  """
  return kl_divergence(teacher, student, temperature=temperature, axis=axis, class_mask=class_mask)


def soft_cross_entropy(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
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
  Use: where a source reports cross entropy; the gradient is kl_divergence's
  Weight: as kl_divergence
  Source: Hinton et al. 2015, section 2, arXiv:1503.02531

  >>> soft_cross_entropy(jnp.array([0., 0.]), jnp.array([0., 0.])).round(4)
  Array(0.6931, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  return t**2 * _softmax.cross_entropy(log_p, log_q)


def total_variation(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  temperature: Scalar = 1.0,
  axis: int = -1,
  class_mask: ArrayLike | None = None,
) -> jax.Array:
  """1/2 sum |p - q|, without the factor T^2.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    [...], between 0 and 1.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities, bounded
  Shapes: [..., C] -> [...]
  Use: sequence models where KL is dominated by rare tokens
  Weight: 1
  Source: f-distill, Wen et al. 2023, arXiv:2307.15190

  >>> total_variation(jnp.array([0., 0.]), jnp.array([0., jnp.log(3.)])).round(4)
  Array(0.25, dtype=float32)
  """
  log_q, log_p, _ = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)


def standardize(
  logits: ArrayLike, *, axis: int = -1, class_mask: ArrayLike | None = None
) -> jax.Array:
  """(z - mean) / (std + 1e-7) over the classes, std with ddof 1, for use before any loss of logits.

  The temperature then multiplies the standard deviation of one. A row of equal logits becomes
  zeros.

  Args:
    logits: logits [..., C].
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits; the others and -inf become
      -inf.

  Returns:
    Standardized logits, of the same shape.

  Source: Logit standardization in KD, Sun et al. 2024, arXiv:2403.01427

  >>> standardize(jnp.array([1., 2., 3.])).round(4)
  Array([-1.,  0.,  1.], dtype=float32)
  """
  logits = _checks.array("logits", logits, ndim=1)
  _checks.axis(axis, logits.shape)
  exists = logits != -jnp.inf
  mask = _checks.mask("class_mask", class_mask, logits.shape)
  exists = exists if mask is None else exists & mask
  count = exists.sum(axis, keepdims=True)
  # Relative to a class: the mean of large logits would be rounded more than they differ.
  base = jax.lax.stop_gradient(jnp.where(exists, logits, -jnp.inf).max(axis, keepdims=True))
  z = jnp.where(exists, logits - base, 0)
  centered = jnp.where(exists, z - z.sum(axis, keepdims=True) / jnp.maximum(count, 1), 0)
  variance = (centered**2).sum(axis, keepdims=True) / jnp.maximum(count - 1, 1)
  return jnp.where(exists, centered / (_checks.root(variance) + 1e-7), -jnp.inf)


def uld(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """sum_i |p_(i) - q_(i)| of probabilities in descending order, the shorter side padded by 0.

  It needs no common vocabulary and compares no token with its translation, only the shapes of the
  two distributions. The paper adds cross entropy with weight 1 and this term with weight 1.5.

  Args:
    student: logits [..., C].
    teacher: logits [..., D].

  Returns:
    [...], between 0 and 2.

  Raises:
    ValueError: the axes before the last differ.

  Compares: sorted probabilities, whatever the vocabularies
  Shapes: [..., C], [..., D] -> [...]
  Use: teacher and student with different tokenizers
  Weight: 1.5
  Source: ULD, Boizard et al. 2024, arXiv:2402.12030

  >>> uld(jnp.array([0., 9.]), jnp.array([9., 0., -jnp.inf]))
  Array(0., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=1, leading=jnp.ndim(student) - 1)
  _softmax.check_classes(student)
  wide = max(student.shape[-1], teacher.shape[-1])
  s, t = (jnp.sort(jnp.exp(_softmax.log_softmax(z)), descending=True) for z in (student, teacher))
  s, t = (jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, wide - z.shape[-1])]) for z in (s, t))
  return jnp.abs(s - t).sum(-1)
