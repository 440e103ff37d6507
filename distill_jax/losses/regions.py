"""Losses that relate the pixels of each class in an image, so that widths may differ.

In a term the labels are an entry of the batch:

  features("map", "map", losses.ifv, project=False, entries={"labels": "label"}, num_classes=19)

Labels of another size than the maps are sampled by nearest neighbor, row floor(i J / H).
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax.losses import _checks


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
  every label that is no class. A class that an image lacks has no effect.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].
    labels: integers [B, ..., J, K], the classes of the pixels. A negative one ignores its pixel.
    num_classes: number >= 1 of classes.
    ignore_label: a further label that ignores its pixel, such as 255; None: no other one.

  Returns:
    [B]; 0 where no pixel has a class, NaN where a label is neither a class nor ignored.

  Raises:
    ValueError: an axis of the maps before the last differs, labels are not integers [B, ..., J, K],
      or num_classes < 1.

  Compares: how features vary within each class of an image
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D], labels [B, ..., J, K] -> [B]
  Use: segmentation, at the last feature map
  Weight: 50
  Source: IFVD, Wang et al. 2020, "Intra-class feature variation distillation" (ECCV)

  >>> student, teacher = jnp.ones((1, 1, 2, 1)), jnp.array([[[[1., 0.], [0., 1.]]]])
  >>> ifv(student, teacher, jnp.zeros((1, 1, 2), int), num_classes=1).round(4)
  Array([0.0858], dtype=float32)
  """
  student, teacher = _checks.maps(student, teacher)
  classes, outside = class_pixels(labels, student, num_classes, ignore_label)
  has_class = classes.any(-1)
  s, t = (_cosines_to_classes(x, classes, has_class) for x in (student, teacher))
  values = ((s - t) ** 2).sum(-1) / jnp.maximum(has_class.sum(-1, dtype=s.dtype), 1)
  return jnp.where(outside, jnp.nan, values)


def region_affinity(
  student: ArrayLike,
  teacher: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  ignore_label: int | None = None,
) -> jax.Array:
  """<(c_s - c_t)^2>, c the cosine between the mean features of two classes in the image.

  The mean is over the pairs of classes that the image has. The authors' code has two classes, so
  one pair: the background and an organ or a tumor.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].
    labels: integers [B, ..., J, K], the classes of the pixels. A negative one ignores its pixel.
    num_classes: number >= 2 of classes, the background included.
    ignore_label: a further label that ignores its pixel, such as 255; None: no other one.

  Returns:
    [B]; 0 where fewer than two classes are present, NaN where a label is neither a class nor
    ignored.

  Raises:
    ValueError: an axis of the maps before the last differs, labels are not integers [B, ..., J, K],
      or num_classes < 2.

  Compares: how the features of tissues differ from one another
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D], labels [B, ..., J, K] -> [B]
  Use: medical segmentation, at an early and a late layer, with `importance_map`
  Weight: 0.9 for each layer
  Source: EMKD, Qin et al. 2021, arXiv:2108.09987

  >>> student, teacher = jnp.ones((1, 1, 2, 1)), jnp.array([[[[1., 0.], [0., 1.]]]])
  >>> region_affinity(student, teacher, jnp.array([[[0, 1]]]), num_classes=2)
  Array([1.], dtype=float32)
  """
  student, teacher = _checks.maps(student, teacher)
  classes, outside = class_pixels(labels, student, num_classes, ignore_label, least=2)
  present = classes.any(1)
  pairs = present[:, :, None] & present[:, None] & np.tri(present.shape[1], k=-1, dtype=bool)[None]
  s, t = (_cosines_of_classes(x, classes) for x in (student, teacher))
  squares = jnp.where(pairs, (s - t) ** 2, 0).sum((1, 2))
  values = squares / jnp.maximum(pairs.sum((1, 2), dtype=squares.dtype), 1)
  return jnp.where(outside, jnp.nan, values)


def class_pixels(
  labels: ArrayLike, maps: jax.Array, num_classes: int, ignore_label: int | None, least: int = 1
) -> tuple[jax.Array, jax.Array]:
  """Returns which pixel has which class, in the dtype of the maps, and which rows are not valid.

  Args:
    labels: integers [B, ..., J, K], sampled at the size of the maps.
    maps: [B, ..., H, W, C].
    num_classes: number of classes.
    ignore_label: a label that ignores its pixel, or None.
    least: smallest number of classes.

  Returns:
    One-hot classes [B, P, num_classes], zeros where a pixel is ignored; bool [B], True where a
    label is neither a class nor ignored.
  """
  num_classes = operator.index(num_classes)
  if num_classes < least:
    raise ValueError(f"num_classes: expected at least {least}, got {num_classes}")
  labels = _nearest(labels, maps.shape[:-1])
  outside = labels >= num_classes
  if ignore_label is not None:
    outside &= labels != ignore_label
    labels = jnp.where(labels == ignore_label, -1, labels)
  labels, outside = (x.reshape(x.shape[0], -1) for x in (labels, outside))
  return jax.nn.one_hot(labels, num_classes, dtype=maps.dtype), outside.any(1)


def class_sums(x: jax.Array, classes: jax.Array) -> jax.Array:
  """Returns the sum of x [B, ..., C] over the pixels of each class [B, P, K], as [B, K, C]."""
  x = jnp.where(classes.any(-1)[..., None], _checks.positions(x), 0)
  return jnp.einsum("bpk,bpc->bkc", classes, x, precision=_checks.HIGHEST)


def _cosines_to_classes(x: jax.Array, classes: jax.Array, has_class: jax.Array) -> jax.Array:
  """Returns the cosine of each pixel of x [B, ..., C] to the mean of its class, [B, P]."""
  # A mean has the direction of its sum.
  directions = _checks.unit(class_sums(x, classes))
  means = jnp.einsum("bpk,bkc->bpc", classes, directions, precision=_checks.HIGHEST)
  x = jnp.where(has_class[..., None], _checks.positions(x), 0)
  return (_checks.unit(x) * means).sum(-1)


def _cosines_of_classes(x: jax.Array, classes: jax.Array) -> jax.Array:
  """Returns the cosines between the means of the classes, [B, K, K]."""
  directions = _checks.unit(class_sums(x, classes))
  return jnp.einsum("bkc,blc->bkl", directions, directions, precision=_checks.HIGHEST)


def _nearest(labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
  """Returns checked labels [B, ..., J, K] at the size of `shape`, [B, ..., H, W]."""
  labels = jnp.asarray(labels)
  if labels.ndim != len(shape) or labels.shape[0] != shape[0] or 0 in labels.shape:
    one_hot = ": drop the last axis, labels[..., 0], or write labels.argmax(-1) for one-hot pixels"
    hint = one_hot if labels.ndim == len(shape) + 1 else ""
    raise ValueError(f"labels: expected one label a pixel, {shape}, got {labels.shape}{hint}")
  labels = _checks.integers("labels", labels, labels.shape)
  for axis in range(1, labels.ndim):
    index = np.arange(shape[axis]) * labels.shape[axis] // shape[axis]
    labels = jnp.take(labels, index, axis)
  return labels
