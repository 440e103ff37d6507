"""Feature losses whose student side is learned: a projection, a generator, a fusion, a variance.

The learned part is outside of the loss, which takes its output, or its parameters as an array.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _rows
from distill_jax.losses._checks import Scalar


def review_kd(
  student: ArrayLike, teacher: ArrayLike, *, levels: Sequence[int] = (4, 2, 1)
) -> jax.Array:
  """Squared error at full size + 1/2, 1/4, 1/8 of it at average pools of 4, 2, 1, over 15/8.

  The divisor is the sum of the weights. A pool that is not smaller than the map is skipped, and its
  weight goes to the next. This is the hierarchical context loss of one stage; the student's map is
  the output of the learned attention-based fusion.

  Args:
    student: fused maps [B, H, W, C].
    teacher: maps of the same shape.
    levels: sizes of the pools, from large to small.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ, or a level < 1.

  Compares: feature values at several resolutions
  Shapes: [B, H, W, C] -> [B]
  Use: image networks, summed over the stages
  Weight: 1 (ImageNet) to 8 (CIFAR-100), warmed up over 20 epochs
  Source: ReviewKD, Chen et al. 2021, arXiv:2104.09044

  >>> review_kd(jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3)))
  Array([1.], dtype=float32)
  """
  student, teacher = _checks.pair(_checks.images("student", student), teacher)
  if any(level < 1 for level in levels):
    raise ValueError(f"levels: expected sizes of at least 1, got {levels}")
  difference = student - teacher  # pooling is linear: pool it once, not both sides
  values, weights = [_checks.per_example(difference**2)], [1.0]
  for level in levels:
    if level < min(student.shape[1:3]):
      weights.append(weights[-1] / 2)
      values.append(weights[-1] * _checks.per_example(pooled(difference, (level, level)) ** 2))
  return sum(values[1:], values[0]) / sum(weights)


def pooled(x: jax.Array, bins: tuple[int, int]) -> jax.Array:
  """Returns adaptive average pooling of x [B, H, W, C] to `bins`.

  Bin i of n is floor(i size / n) to ceil((i + 1) size / n).
  """
  height, width = bins
  if x.shape[1] % height == 0 and x.shape[2] % width == 0:
    cut = x.reshape(len(x), height, x.shape[1] // height, width, x.shape[2] // width, x.shape[3])
    return cut.mean((2, 4))
  pools = (_pooling(size, n, x.dtype) for size, n in zip(x.shape[1:3], bins))
  return jnp.einsum("bhwc,ih,jw->bijc", x, *pools, precision=_checks.HIGHEST)


def _pooling(size: int, bins: int, dtype) -> np.ndarray:
  """Returns average pooling of one axis as a matrix [bins, size]."""
  starts = [i * size // bins for i in range(bins)]
  ends = [-(-(i + 1) * size // bins) for i in range(bins)]
  return np.stack(
    [(np.arange(size) >= a) & (np.arange(size) < b) for a, b in zip(starts, ends)]
  ).astype(dtype) / np.subtract(ends, starts)[:, None].astype(dtype)


def mgd(generated: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Sum over all positions of (generated - t)^2, generated from a randomly masked student.

  The masks differ by task: positions in space for dense prediction (65 %), channels for
  classification (15 %).

  Args:
    generated: maps [B, ...].
    teacher: maps of the same shape.

  Returns:
    [B], summed over positions and channels.

  Raises:
    ValueError: shapes differ.

  Compares: feature values, generated from a part of the student's
  Shapes: [B, ...] -> [B]
  Use: detection, segmentation and classification, at the last stage or the neck
  Weight: 2e-5 (two-stage and dense), 7e-5 (classification)
  Source: MGD, Yang et al. 2022, arXiv:2205.01529

  >>> mgd(jnp.array([[1., 2.]]), jnp.array([[1., 4.]]))
  Array([4.], dtype=float32)
  """
  generated, teacher = _checks.pair(generated, teacher)
  return _checks.per_example((generated - teacher) ** 2, total=True)


def vid(mean: ArrayLike, teacher: ArrayLike, raw_scale: ArrayLike) -> jax.Array:
  """1/2 <(mean - t)^2 / v + log v>, v = softplus(raw_scale) + 1e-5: a bound on mutual information.

  Args:
    mean: the student's prediction of the teacher, from a learned regressor, [B, ..., C].
    teacher: features of the same shape.
    raw_scale: learned scale [C]; starts at `vid_raw_scale(C)`.

  Returns:
    [B]; may be negative.

  Raises:
    ValueError: shapes differ, or raw_scale is not [C].

  Compares: feature values, each channel with a learned variance
  Shapes: [B, ..., C], raw_scale [C] -> [B]
  Use: image networks where some of the teacher's channels cannot be predicted
  Weight: 1
  Source: VID, Ahn et al. 2019, arXiv:1904.05835

  >>> vid(jnp.zeros((1, 2)), jnp.zeros((1, 2)), vid_raw_scale(2, variance=1.)).round(4)
  Array([0.], dtype=float32)
  """
  mean, teacher = _checks.pair(mean, teacher, ndim=2)
  raw_scale = _checks.array("raw_scale", raw_scale).astype(mean.dtype)
  if raw_scale.shape != mean.shape[-1:]:
    raise ValueError(
      f"raw_scale: expected one value a channel, {mean.shape[-1:]}, got {raw_scale.shape}"
    )
  variance = jax.nn.softplus(raw_scale) + 1e-5
  variance = jnp.broadcast_to(variance, mean.shape)
  return 0.5 * _checks.per_example((mean - teacher) ** 2 / variance + jnp.log(variance))


def vid_raw_scale(channels: int, *, variance: Scalar = 5.0) -> jax.Array:
  """Returns the initial raw_scale of `vid`: [channels] with softplus(raw) + 1e-5 = variance.

  Raises:
    ValueError: variance <= 1e-5.

  >>> jax.nn.softplus(vid_raw_scale(1)).round(4)
  Array([5.], dtype=float32)
  """
  variance = _checks.number("variance", variance, jnp.float32, low=1e-5, open_low=True)
  return jnp.full(channels, jnp.log(jnp.expm1(variance - 1e-5)), jnp.float32)


def srd(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  power: Scalar = 4.0,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """log sum |s - t|^power over the full batch, both sides after batch norm without scale and bias.

  Batch norm here is that of training: mean and variance (ddof 0, eps 1e-4) of the valid rows and of
  space.

  Args:
    student: features [B, ..., C], through a learned linear projection.
    teacher: features of the same shape.
    power: exponent >= 1, may be traced.
    where: valid rows, bool [B].
    axis_name: mapped axis whose devices hold the other rows.

  Returns:
    A scalar. At student = teacher its limit is -inf, its value here the log of the smallest normal
    number.

  Raises:
    ValueError: shapes differ, or power < 1.

  Compares: feature values, normalized per channel
  Shapes: [B, ..., C] -> scalar
  Use: penultimate features through one linear layer
  Weight: 1 in addition to cross entropy and kl_divergence
  Source: SRD, Miles & Mikolajczyk 2024, arXiv:2303.11098

  >>> srd(jnp.array([[1.], [3.]]), jnp.array([[3.], [1.]])).round(3)
  Array(3.466, dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=2)
  power = _checks.number("power", power, student.dtype, low=1)
  student, teacher, where = _rows.gather(student, teacher, where=where, axis_name=axis_name)

  def normalize(x):
    centered, variance = _rows.moments(x, where)
    return centered * jax.lax.rsqrt(variance + 1e-4)

  difference = jnp.abs(normalize(student) - normalize(teacher))
  total = (difference**power).sum()
  return jnp.where(where.any(), jnp.log(jnp.maximum(total, jnp.finfo(total.dtype).tiny)), 0)


def vkd(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """<smooth L1 (s - layer_norm(t))>, s orthogonally projected to the teacher's width.

  An orthogonal projection [C_s, C_t] is `jax.scipy.linalg.expm(raw - raw.T)[:C_s]` of a learned raw
  [C_t, C_t].

  Args:
    student: projected features [B, ..., C].
    teacher: features of the same shape; layer norm without scale and bias, eps 1e-5, is applied
      here.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ.

  Compares: feature values, the teacher's normalized per example
  Shapes: [B, ..., C] -> [B]
  Use: transformers, at the last layer
  Weight: 1
  Source: VkD, Miles et al. 2024, arXiv:2403.06213

  >>> vkd(jnp.array([[-1., 1.]]), jnp.array([[2., 4.]])).round(4)
  Array([0.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=2)
  centered = teacher - teacher.mean(-1, keepdims=True)
  normal = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
  return _checks.per_example(_checks.smooth_l1(student - normal))
