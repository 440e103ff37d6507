"""Cross-image relational distillation (CIRKD): pixels against those of other images, by class.

Features are L2-normalized here. The memory is an argument and a result of the loss; it has no
gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import compat
from distill_jax.losses import _checks, _rows, _softmax
from distill_jax.losses._checks import Scalar
from distill_jax.losses.regions import class_pixels, class_sums


class CirkdState(NamedTuple):
  """The memory of `cirkd`: rings of the teacher's directions, one for each class.

  Attributes:
    pixels: directions of pixels, [K, N, D].
    regions: directions of the mean of a class in an image, [K, M, D].
    next_pixel: position of each class's oldest pixel, integers [K].
    next_region: position of each class's oldest region, integers [K].

  >>> state = cirkd_state(jax.random.key(0), 3, 8, pixels=5, regions=2)
  >>> state.regions.shape, state.next_region.shape
  ((3, 2, 8), (3,))
  """

  pixels: jax.Array
  regions: jax.Array
  next_pixel: jax.Array
  next_region: jax.Array


def cirkd_state(
  key: jax.Array, num_classes: int, width: int, *, pixels: int = 20000, regions: int = 2000
) -> CirkdState:
  """Returns memories of random directions: `pixels` and `regions` of `width` for each class.

  In float32 they take 4 x num_classes x (pixels + regions) x width bytes: 428 MB for 19 classes of
  width 256. Smaller memories suit small data: what is still random after the first epochs is noise.

  >>> cirkd_state(jax.random.key(0), 3, 8, pixels=5, regions=2).pixels.shape
  (3, 5, 8)
  """
  sizes = {"num_classes": num_classes, "width": width, "pixels": pixels, "regions": regions}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"{name}: expected at least 1, got {size}")
  keys = jax.random.split(key)
  memories = (
    _checks.unit(jax.random.normal(k, (num_classes, size, width), jnp.float32))
    for k, size in zip(keys, (pixels, regions))
  )
  return CirkdState(*memories, *jnp.zeros((2, num_classes), jnp.int32))


def cirkd(
  student: ArrayLike,
  teacher: ArrayLike,
  projected: ArrayLike,
  labels: ArrayLike,
  key: jax.Array,
  state: CirkdState,
  *,
  temperature: Scalar = 0.1,
  pixel_weight: Scalar = 0.1,
  region_weight: Scalar = 0.1,
  samples: tuple[int, int] = (4096, 1024),
  pixels_per_class: int = 16,
  ignore_label: int | None = None,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, CirkdState]:
  """KL(batch) + pixel_weight KL(pixel memory) + region_weight KL(region memory).

  Each is <KL(softmax(cos(t, v) / T) || softmax(cos(s, v) / T))> over pixels. Of the batch: v are
  the pixels of one image, on either side its own; the mean is over all pairs of images, an image
  with itself included. Of a memory: v are samples of the teacher's pixels or regions of earlier
  batches, as many of each class, for both sides; the student is `projected`, and the mean is over
  the pixels with a class. No factor T^2: T sharpens similarities here.

  After that the valid rows enter the memory: of each image and class the mean of the pixels'
  directions, and at most `pixels_per_class` random pixels. The paper samples them among the pixels
  of the class. The authors' code takes positions from the start of the image instead, and lets a
  batch enter before the loss.

  B^2 P^2 similarities of P positions are computed on each side, one image against the batch at a
  time.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].
    projected: the student's maps through a learned head, of the teacher's shape.
    labels: integers [B, ..., J, K], the classes of the pixels, sampled by nearest neighbor at the
      maps' size. A negative one ignores its pixel in the memories.
    key: typed PRNG key of the samples; the same on all devices.
    state: memory from `cirkd_state` or the last call.
    temperature: T > 0, may be traced.
    pixel_weight: weight >= 0 of the pixel memory, may be traced.
    region_weight: weight >= 0 of the region memory, may be traced.
    samples: numbers of pixels and of regions of the memory that a pixel is compared with, each
      rounded up to a multiple of the classes; at most all of them.
    pixels_per_class: number of pixels of an image and class that enter the memory.
    ignore_label: a further label that ignores its pixel, such as 255; None: no other one.
    where: valid rows, bool [B]: only they count and enter the memory.
    axis_name: mapped axis whose devices hold the other rows, so that all keep one state.

  Returns:
    A scalar, nats, and the next state. Where a label of a valid row is neither a class nor
    ignored, the scalar is NaN, and the row does not enter the memory.

  Raises:
    ValueError: shapes differ or do not fit the memory, labels are not integers [B, ..., J, K],
      temperature <= 0, a negative weight, or a number < 1.

  Compares: each pixel with those of the batch, and with a memory of pixels and regions
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D] x 2, labels [B, ..., J, K], key, state -> scalar,
    state
  Use: segmentation, at the last feature map
  Weight: 1; on VOC with pixel_weight and region_weight 0.01
  Source: CIRKD, Yang et al. 2022, arXiv:2204.06986

  >>> state = cirkd_state(jax.random.key(0), 2, 3, pixels=4, regions=4)
  >>> maps, labels = jnp.eye(3)[None, None], jnp.array([[[0, 1, 1]]])
  >>> loss, state = cirkd(maps, maps, maps, labels, jax.random.key(1), state)
  >>> loss, state.next_pixel
  (Array(0., dtype=float32), Array([1, 2], dtype=int32))
  """
  student, teacher = _checks.maps(student, teacher)
  projected = _checks.array("projected", projected).astype(teacher.dtype)
  _check_sizes(projected, teacher, state, samples, pixels_per_class)
  t = _checks.positive("temperature", temperature, student.dtype)
  pixel_weight = _checks.number("pixel_weight", pixel_weight, student.dtype, low=0)
  region_weight = _checks.number("region_weight", region_weight, student.dtype, low=0)
  classes, outside = class_pixels(labels, teacher, state.pixels.shape[0], ignore_label)
  *maps, where = _rows.gather(*map(_checks.positions, (student, teacher, projected)), where=where)
  student, teacher, projected = (_checks.unit(x) for x in maps)
  state = jax.lax.stop_gradient(CirkdState(*map(jnp.asarray, state)))
  pixel_key, region_key, entry_key = jax.random.split(key, 3)
  value = _among_images(student, teacher, where, t, axis_name)
  for weight, memory in (
    (pixel_weight, _sample(pixel_key, state.pixels, samples[0])),
    (region_weight, _sample(region_key, state.regions, samples[1])),
  ):
    sums = _to_memory(projected, teacher, memory.astype(teacher.dtype), classes.any(-1), t)
    sums = jnp.where(outside, jnp.nan, sums)
    pixels = classes.any(-1).sum(-1, dtype=sums.dtype)
    sums, pixels, _ = _rows.gather(sums, pixels, where=where, axis_name=axis_name)
    value += weight * sums.sum() / jnp.maximum(pixels.sum(), 1)
  rows = jax.lax.stop_gradient((teacher, classes, where & ~outside))
  return value, _updated(state, *rows, entry_key, pixels_per_class, axis_name)


def _check_sizes(
  projected: jax.Array,
  teacher: jax.Array,
  state: CirkdState,
  samples: tuple[int, int],
  pixels_per_class: int,
) -> None:
  """Raises ValueError where shapes do not fit the teacher's, or a number is not positive."""
  if projected.shape != teacher.shape:
    raise ValueError(
      f"projected: expected the teacher's shape {teacher.shape}, got {projected.shape}"
    )
  if teacher.shape[-1] != state.pixels.shape[-1]:
    raise ValueError(
      f"state: expected a memory of width {teacher.shape[-1]} for teacher {teacher.shape}, got "
      f"{state.pixels.shape}"
    )
  if len(samples) != 2 or min(samples) < 1:
    raise ValueError(
      f"samples: expected two numbers of at least 1, of pixels and of regions, got {samples}"
    )
  if pixels_per_class < 1:
    raise ValueError(f"pixels_per_class: expected at least 1, got {pixels_per_class}")


def _among_images(
  student: jax.Array,
  teacher: jax.Array,
  where: jax.Array,
  temperature: Scalar,
  axis_name: str | None,
) -> jax.Array:
  """Returns the mean divergence over all pixels and pairs of valid images.

  A device compares its own images with those of all devices.
  """
  *others, valid = _rows.gather(student, teacher, where=where, axis_name=axis_name)

  @jax.checkpoint  # The gradient then also holds the similarities of one image at a time.
  def image(own):
    log_q, log_p = (
      _softmax.log_softmax(
        jnp.einsum("pc,bqc->bpq", x, y, precision=_checks.HIGHEST), temperature=temperature
      )
      for x, y in zip(own, others)
    )
    return jnp.where(valid, _softmax.divergence(log_p, log_q).mean(-1), 0).sum()

  sums = jax.lax.map(image, (student, teacher))
  sums, _ = _rows.gather(sums, where=where, axis_name=axis_name)
  return sums.sum() / _rows.count(valid, sums.dtype) ** 2


def _to_memory(
  student: jax.Array,
  teacher: jax.Array,
  memory: jax.Array,
  has_class: jax.Array,
  temperature: Scalar,
) -> jax.Array:
  """Returns the sum of the divergences over the pixels of each image with a class, [B]."""

  @jax.checkpoint
  def image(own):
    log_q, log_p = (
      _softmax.log_softmax(
        jnp.matmul(x, memory.T, precision=_checks.HIGHEST), temperature=temperature
      )
      for x in own[:2]
    )
    return jnp.where(own[2], _softmax.divergence(log_p, log_q), 0).sum()

  return jax.lax.map(image, (student, teacher, has_class))


def _sample(key: jax.Array, memory: jax.Array, samples: int) -> jax.Array:
  """Returns random entries of memory [K, N, D], the same positions of each class: [S, D]."""
  num_classes, size, width = memory.shape
  count = min(size, -(-samples // num_classes))
  positions = jax.random.choice(key, size, (count,), replace=False)
  return memory[:, positions].reshape(-1, width)


def _updated(
  state: CirkdState,
  teacher: jax.Array,
  classes: jax.Array,
  where: jax.Array,
  key: jax.Array,
  pixels_per_class: int,
  axis_name: str | None,
) -> CirkdState:
  """Returns the memory with the valid rows of all devices in place of its oldest entries."""
  size, positions, _ = teacher.shape
  first = 0 if axis_name is None else size * jax.lax.axis_index(axis_name)
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(size))
  order = jax.vmap(lambda k: jax.random.uniform(k, (positions,), jnp.float32))(keys)
  is_class = jnp.moveaxis(classes > 0, 2, 1) & where[:, None, None]  # [B, K, P]
  order, pixel = jax.lax.top_k(
    jnp.where(is_class, order[:, None], -1), min(pixels_per_class, positions)
  )
  pixels = jax.vmap(lambda x, i: x[i])(teacher, pixel)
  regions = _checks.unit(class_sums(teacher, classes))
  rows = [pixels, order >= 0, regions[:, :, None], is_class.any(-1)[..., None]]
  if axis_name is not None:
    rows = [compat.all_gather_invarying(x, axis_name) for x in rows]
  pixels, is_pixel, regions, is_region = (
    jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[3:]) for x in rows
  )
  push = jax.vmap(_rows.push)
  new_pixels, next_pixel = push(state.pixels, state.next_pixel, pixels, is_pixel)
  new_regions, next_region = push(state.regions, state.next_region, regions, is_region)
  return CirkdState(new_pixels, new_regions, next_pixel, next_region)
