"""Losses for dense prediction: segmentation maps, boxes and detectors' features.

Per-pixel distillation is `kl_divergence` of [B, H, W, C] logits, with the valid pixels [B, H, W] as
the mask:

  reduce.mean(losses.kl_divergence(student, teacher), labels != 255)  # 255: the label of pixels to
  ignore

In an objective: `objectives.logits(losses.kl_divergence, ignore_label=255)`, with resize=True where
the logits have another grid than the labels (`resize_logits`). `objectives.labels` and the losses
of classes' regions (regions.py) take ignore_label=255. The losses of maps take volumes [B, D, H, W,
C] and clips [B, T, H, W, C] as well.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar
from distill_jax.losses.features import attention_transfer


def cwd(student: ArrayLike, teacher: ArrayLike, *, temperature: Scalar = 4.0) -> jax.Array:
  """T^2 KL per channel between softmaxes over space, mean over channels.

  Args:
    student: maps [B, ..., H, W, C], features or logits.
    teacher: maps of the same shape.
    temperature: T > 0, may be traced.

  Returns:
    Nats, [B].

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: where each channel is active
  Shapes: [B, ..., H, W, C] -> [B]
  Use: segmentation and detection
  Weight: 3 (logits; MMRazor 5 at T = 1), 50 (features, T = 4)
  Source: CWD, Shu et al. 2021, arXiv:2011.13256

  >>> teacher = jnp.array([[[[0.], [4. * jnp.log(3.)]]]])
  >>> cwd(jnp.zeros((1, 1, 2, 1)), teacher, temperature=4.).round(4)
  Array([2.093], dtype=float32)
  """
  student, teacher = (_checks.positions(x) for x in _checks.pair(student, teacher, ndim=4))
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis=1)
  return t**2 * _softmax.divergence(log_p, log_q).mean(-1)


def importance_map(student: ArrayLike, teacher: ArrayLike, *, p: Scalar = 4) -> jax.Array:
  """sum (Q_s - Q_t)^2 with Q = vec(mean_c |F|^p) over its L2 norm: where a map has large values.

  The exponent 4 and the sum of the squares are those of the authors' code. `attention_transfer`
  has the exponent 2 and the mean of the squares.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].
    p: exponent >= 1, may be traced.

  Returns:
    [B], from 0 to 2. A map of zeros counts as a Q of zeros.

  Raises:
    ValueError: an axis before the last differs (pool the larger map first), or p < 1.

  Compares: the most active positions, whatever the channels
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D] -> [B]
  Use: medical segmentation, at an early and a late layer, with `region_affinity`
  Weight: 0.9 for each layer
  Source: EMKD, Qin et al. 2021, arXiv:2108.09987

  >>> importance_map(jnp.ones((1, 1, 2, 3)), jnp.array([[[[1.], [0.]]]])).round(4)
  Array([0.5858], dtype=float32)
  """
  return attention_transfer(student, teacher, p=p) * math.prod(jnp.shape(student)[1:-1])


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


def score_weighted(
  student: ArrayLike,
  teacher: ArrayLike,
  scores: ArrayLike,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """sum scores (s - t)^2 / (C sum scores), sums over batch, space and channels: the score-weighted
  L2.

  The denominator is that of the batch, as in the published code: an image without objects, whose
  scores are all small, counts little.

  Args:
    student: maps [B, ..., C], through a learned adapter to the teacher's channels.
    teacher: maps of the same shape.
    scores: weights >= 0 [B, ...], such as the teacher's highest class probability at each position.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar; 0 where all scores are 0.

  Raises:
    ValueError: shapes differ, or the scores are not one a position.

  Compares: maps where the teacher sees an object
  Shapes: [B, ..., C], scores [B, ...] -> scalar
  Use: detectors, at each level of the neck
  Weight: 6, next to a detection loss of one value an image
  Source: Ultralytics 8.4, guide to knowledge distillation, 2026

  >>> student, teacher = jnp.zeros((1, 2, 1)), jnp.array([[[1.], [3.]]])
  >>> score_weighted(student, teacher, jnp.array([[0.75, 0.25]]))
  Array(3., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=2)
  scores = _checks.array("scores", scores).astype(student.dtype)
  if scores.shape != student.shape[:-1]:
    raise ValueError(
      f"scores: expected one a position, {student.shape[:-1]}, got {scores.shape}: take the "
      "largest over the classes"
    )
  *rows, where = _rows.gather(student, teacher, scores, where=where)
  student, teacher, scores = rows
  error = _rows.flat(((student - teacher) ** 2).mean(-1) * scores).sum(-1)
  # Sums of rows are gathered, instead of maps.
  error, weight, _ = _rows.gather(
    error, _rows.flat(scores).sum(-1), where=where, axis_name=axis_name
  )
  total = weight.sum()
  return jnp.where(total > 0, error.sum() / jnp.where(total > 0, total, 1), 0)
