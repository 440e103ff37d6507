"""Losses that relate the positions of one map to one another, so that widths may differ."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax.losses import _checks


def affinity(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """sum_i |A_s,i - A_t,i|_2, A_ij the cosine between positions i and j over their number.

  torchdistill instead sums, over the channels, the norms of the differences between outer
  products of each channel's map over its norm.

  Args:
    student: maps [B, ..., C], such as [B, H, W, C] or [B, length, C].
    teacher: maps [B, ..., D].

  Returns:
    [B].

  Raises:
    ValueError: an axis before the last differs (pool the larger map first), or fewer than 3 axes.

  Compares: similarities between all positions of a map
  Shapes: [B, H, W, C], [B, H, W, D] -> [B]
  Use: segmentation, where the student lacks long-range context
  Weight: 1
  Source: Affinity distillation, He et al. 2019, arXiv:1903.04688

  >>> affinity(jnp.array([[[1.], [2.]]]), jnp.array([[[1., 0.], [0., 1.]]]))
  Array([1.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=3, leading=max(jnp.ndim(student) - 1, 1))
  s, t = (_cosines(x) for x in (student, teacher))
  return _checks.root(((s - t) ** 2).sum(-1)).sum(-1) / s.shape[-1]


def ifv(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  ignore_label: int | None = None,
) -> jax.Array:
  """<(m_s - m_t)^2>, m the cosine of a pixel's features to the mean of its class in the image.

  The mean is over the pixels with a class. The reference code divides by all pixels, and ignores
  every label that is no class. In a term the labels are an entry of the batch:
  `features("map", "map", losses.ifv, project=False, entries={"labels": "label"}, num_classes=19)`.

  Args:
    student: maps [B, H, W, C].
    teacher: maps [B, H, W, D].
    labels: integers [B, J, K], the classes of the pixels; where J, K is not H, W they are sampled
      by nearest neighbor, row floor(i J / H). A negative one ignores its pixel.
    num_classes: number >= 1 of classes.
    ignore_label: a further label that ignores its pixel, such as 255; None: no other one.

  Returns:
    [B]; 0 where no pixel has a class, NaN where a label is neither a class nor ignored.

  Raises:
    ValueError: batch, height or width of the maps differ, labels are not integers [B, J, K], or
      num_classes < 1.

  Compares: how features vary within each class of an image
  Shapes: [B, H, W, C], [B, H, W, D], labels [B, J, K] -> [B]
  Use: segmentation, at the last feature map
  Weight: 50
  Source: IFVD, Wang et al. 2020, "Intra-class feature variation distillation" (ECCV)

  >>> student, teacher = jnp.ones((1, 1, 2, 1)), jnp.array([[[[1., 0.], [0., 1.]]]])
  >>> ifv(student, teacher, jnp.zeros((1, 1, 2), int), num_classes=1).round(4)
  Array([0.0858], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, exactly=4, leading=3)
  num_classes = operator.index(num_classes)
  if num_classes < 1:
    raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
  labels = _nearest(labels, student.shape[:3])
  classes = jax.nn.one_hot(labels.reshape(labels.shape[0], -1), num_classes, dtype=student.dtype)
  has_class = classes.any(-1)
  s, t = (_cosines_to_classes(x, classes, has_class) for x in (student, teacher))
  values = ((s - t) ** 2).sum(-1) / jnp.maximum(has_class.sum(-1, dtype=s.dtype), 1)
  outside = labels >= num_classes
  if ignore_label is not None:
    outside &= labels != ignore_label
  return jnp.where(outside.any((1, 2)), jnp.nan, values)


def _cosines_to_classes(x: jax.Array, classes: jax.Array, has_class: jax.Array) -> jax.Array:
  """Returns the cosine of each pixel of x [B, H, W, C] to the mean of its class, [B, H W]."""
  x = jnp.where(has_class[..., None], x.reshape(x.shape[0], -1, x.shape[-1]), 0)
  sums = jnp.einsum("bpk,bpc->bkc", classes, x, precision=_checks.HIGHEST)
  # A mean has the direction of its sum.
  means = jnp.einsum("bpk,bkc->bpc", classes, _checks.unit(sums), precision=_checks.HIGHEST)
  return (_checks.unit(x) * means).sum(-1)


def _nearest(labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
  """Returns checked labels [B, J, K] at the size of `shape`, [B, H, W]."""
  labels = jnp.asarray(labels)
  if labels.ndim != 3 or labels.shape[0] != shape[0] or 0 in labels.shape:
    raise ValueError(f"labels: expected one label a pixel, {shape}, got {labels.shape}")
  labels = _checks.integers("labels", labels, labels.shape)
  _, height, width = labels.shape
  rows = np.arange(shape[1]) * height // shape[1]
  columns = np.arange(shape[2]) * width // shape[2]
  return labels[:, rows][:, :, columns]


def _cosines(x: jax.Array) -> jax.Array:
  """Returns the cosines between all pairs of positions of x [B, ..., C], [B, P, P]."""
  unit = _checks.unit(x.reshape(x.shape[0], -1, x.shape[-1]))
  return jnp.einsum("bpc,bqc->bpq", unit, unit, precision=_checks.HIGHEST)
