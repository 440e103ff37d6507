"""Losses for dense prediction: segmentation maps, boxes and detectors' features.

Per-pixel distillation is `kl_divergence` of [B, H, W, C] logits, with the valid pixels [B, H, W] as
the mask:

  reduce.mean(losses.kl_divergence(student, teacher), labels != 255)  # 255: the label of pixels to
  ignore

In an objective: `objectives.logits(losses.kl_divergence, valid="pixels")` and the batch's 'pixels'
= labels != 255. A loss that takes labels, such as `dkd`, wants a negative one where a pixel is
ignored: 'label' = where(labels == 255, -1, labels). `objectives.labels` and `ifv` take
ignore_label=255.
"""

import jax
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar


def cwd(student: ArrayLike, teacher: ArrayLike, *, temperature: Scalar = 4.0) -> jax.Array:
  """T^2 KL per channel between softmaxes over space, mean over channels.

  Args:
    student: maps [B, H, W, C], features or logits.
    teacher: maps of the same shape.
    temperature: T > 0, may be traced.

  Returns:
    Nats, [B].

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: where each channel is active
  Shapes: [B, H, W, C] -> [B]
  Use: segmentation and detection
  Weight: 3 (logits), 50 (features)
  Source: CWD, Shu et al. 2021, arXiv:2011.13256

  >>> teacher = jnp.array([[[[0.], [4. * jnp.log(3.)]]]])
  >>> cwd(jnp.zeros((1, 1, 2, 1)), teacher, temperature=4.).round(4)
  Array([2.093], dtype=float32)
  """
  pair = _checks.pair(student, teacher, exactly=4)
  student, teacher = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in pair)
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis=1)
  return t**2 * _softmax.divergence(log_p, log_q).mean(-1)


def pearson(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """1/2 <(s - t)^2> of maps standardized per channel over batch and space, ddof 1, eps 1e-6.

  Args:
    student: maps [B, ..., C].
    teacher: maps of the same shape.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar: 1 - Pearson's correlation, but for eps and ddof, mean over channels.

  Raises:
    ValueError: shapes differ.

  Compares: maps up to each channel's scale and shift
  Shapes: [B, ..., C] -> scalar
  Use: detectors of different kinds, at the neck
  Weight: 6
  Source: PKD, Cao et al. 2022, arXiv:2207.02039

  >>> x = jnp.array([[1., 2.], [3., 1.]])
  >>> pearson(x, 2 * x + 1).round(4)
  Array(0., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=2)
  student, teacher, where = _rows.gather(student, teacher, where=where, axis_name=axis_name)

  def standard(x):
    centered, variance = _rows.moments(x, where, ddof=1)
    return centered / (_checks.root(variance) + 1e-6)

  values = _checks.per_example((standard(student) - standard(teacher)) ** 2)
  return 0.5 * values.sum() / _rows.count(where, values.dtype)


def localization(
  student: ArrayLike, teacher: ArrayLike, *, temperature: Scalar = 10.0
) -> jax.Array:
  """T^2 KL summed over box edges and over the bins of each edge.

  The paper sums; published code averages over the bins (17 times less at 17 bins) and over the
  edges.

  Args:
    student: logits of the bins of each edge, [..., edges, bins].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced.

  Returns:
    Nats per box, [...].

  Raises:
    ValueError: shapes differ or have fewer than 2 axes, or temperature <= 0.

  Compares: distributions of box edges
  Shapes: [..., edges, bins] -> [...]
  Use: detectors that predict edges as distributions (GFL)
  Weight: 0.25
  Source: LD, Zheng et al. 2022, arXiv:2102.12252

  >>> localization(jnp.zeros((4, 8)), jnp.zeros((4, 8)))
  Array(0., dtype=float32)
  """
  _checks.pair(student, teacher, ndim=2)
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature)
  return t**2 * _softmax.divergence(log_p, log_q).sum(-1)
