"""Augments images on the device: a view of an image is a function of (seed, example id, view).

The same three numbers give the same image in every batch, on every device and in every run, so a
cache can hold the outputs of an augmented teacher. `mixup` and `cutmix` relate the rows of a batch
instead: they are functions of (step key, batch), and raise for a batch with cached outputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax.data.checks import check_integer, check_seed
from distill_jax.types import Batch

Transform = Callable[[jax.Array, jax.Array], jax.Array]
"""`(key, image [height, width, channels]) -> image` of the same shape and dtype."""
Mixer = Callable[[jax.Array, Batch], Batch]


def augmentation(*transforms: Transform, seed: int) -> Callable[[Batch], Batch]:
  """Composes transforms of one image into a function of a batch.

  The key of transform i of an example is `fold_in(fold_in(fold_in(key(seed), id), view), i)`,
  always of Threefry, since other generators give a row other numbers if
  the rest of its batch changes.

  Args:
    *transforms: functions of one image, applied in this order, e.g. `shift_crop(4), flip()`; by
      default the identity.
    seed: from 0 to 2^32 - 1.

  Returns:
    `batch -> batch` that changes only 'image'. It reads 'id' and 'view', int [rows].

  Raises:
    ValueError: `seed` is out of its range; when called, the batch lacks an entry.

  >>> batch = {"image": jnp.ones((2, 8, 8, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augmentation(shift_crop(1), flip(), seed=0)(batch)["image"].shape
  (2, 8, 8, 1)
  """
  check_seed(seed)

  def augment_image(image, id, view):
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, id), view)
    for i, transform in enumerate(transforms):
      image = transform(jax.random.fold_in(key, i), image)
    return image

  def augment(batch: Batch) -> Batch:
    if not transforms:
      return batch
    _require(batch, "image", "id", "view")
    return {**batch, "image": jax.vmap(augment_image)(batch["image"], batch["id"], batch["view"])}

  return augment


def shift_crop(padding: int) -> Transform:
  """Pads every side with zeros and crops the original size at a uniformly random position.

  He et al. 2016 (section 4.2) train CIFAR networks with padding 4 and `flip`.

  Args:
    padding: largest shift in pixels.

  Raises:
    ValueError: `padding` is negative; when called, it is not smaller than the image (a shift could
      hide all of it).
  """
  if padding < 0:
    raise ValueError(f"padding: expected a number >= 0, got {padding}")

  def transform(key, image):
    if padding >= min(image.shape[:2]):
      raise ValueError(
        f"padding: expected less than the sides of the image {image.shape[:2]}, got {padding}"
      )
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1, jnp.int32)
    return jax.lax.dynamic_slice(padded, (row, column, jnp.int32(0)), image.shape)

  return transform


def flip() -> Transform:
  """Mirrors left and right with probability 1/2."""

  def transform(key, image):
    return jnp.where(jax.random.bits(key, (), jnp.uint32) & 1, image[:, ::-1], image)

  return transform


def mixup(alpha: float, classes: int) -> Mixer:
  """Blends each image, and its label, with the one before it in the batch (Zhang et al. 2018).

  One weight from Beta(alpha, alpha) per batch, as in the authors' code. Batches are shuffled, so
  the row before is a random partner, and needs no gather across devices. Under `pmap` or
  `shard_map` each device pairs its local rows.

  Args:
    alpha: parameter of the Beta distribution, > 0; the paper uses 0.1 to 0.4 on ImageNet, 1 on
      CIFAR.
    classes: number of classes.

  Returns:
    `(key, batch) -> batch`: 'image' blended, 'label' rows of probabilities [rows, classes]. An
    example without a label (negative, or a row of zeros) adds no mass to it, so a row may sum to
    less than 1. All other entries stay. Rows that 'where' leaves out are no partner of any row.

  Raises:
    ValueError: an argument is outside its range; when called, there are cached teacher outputs in
      the batch, or the labels do not fit `classes`.
  """
  _check_mixer(alpha, classes)

  def mix(key, batch):
    image, partner, labels, partners = _pair(batch, classes)
    weight = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    blend = weight * image + (1 - weight) * partner
    return {
      **batch,
      "image": blend.astype(image.dtype),
      "label": weight * labels + (1 - weight) * partners,
    }

  return mix


def cutmix(alpha: float, classes: int) -> Mixer:
  """Pastes a rectangle of the image before it in the batch over each image (Yun et al. 2019).

  One weight w from Beta(alpha, alpha) and one rectangle per batch, as in the authors' code: sides
  sqrt(1 - w) of the image's, center uniform, clipped at the border; labels are weighted by the
  covered area after clipping (section 3.1, equation 2).

  Args:
    alpha: parameter of the Beta distribution, > 0; the paper uses 1.
    classes: number of classes.

  Returns:
    `(key, batch) -> batch` as of `mixup`, with pasted instead of blended images.

  Raises:
    ValueError: as `mixup`.
  """
  _check_mixer(alpha, classes)

  def mix(key, batch):
    image, partner, labels, partners = _pair(batch, classes)
    pasted = _rectangle(key, alpha, *image.shape[1:3])
    weight = 1 - pasted.mean(dtype=jnp.float32)
    label = weight * labels + (1 - weight) * partners
    return {**batch, "image": jnp.where(pasted[..., None], partner, image), "label": label}

  return mix


def _rectangle(key: jax.Array, alpha: float, height: int, width: int) -> jax.Array:
  """Returns the mask of a random rectangle, bool [height, width], True inside."""
  weight_key, center_key = jax.random.split(key)
  side = jnp.sqrt(1 - jax.random.beta(weight_key, alpha, alpha, dtype=jnp.float32))

  def inside(key, size):
    half = (size * side).astype(jnp.int32) // 2
    center = jax.random.randint(key, (), 0, size, jnp.int32)
    position = jnp.arange(size)
    return (center - half <= position) & (position < center + half)

  row_key, column_key = jax.random.split(center_key)
  return inside(row_key, height)[:, None] & inside(column_key, width)


def _pair(batch: Batch, classes: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns images, the partners' images, rows of probabilities, and the partners' rows."""
  _require(batch, "image", "label")
  cached = sorted(name for name in batch if name.startswith("teacher/"))
  if cached:
    raise ValueError(
      f"{cached[0]}: expected no cached teacher output, each mixed image is new: use a live teacher"
    )
  labels = _probabilities(batch["label"], classes)
  has_partner = jnp.roll(batch["where"], 1) if "where" in batch else jnp.ones(len(labels), bool)

  def partner(rows):
    mask = has_partner.reshape((-1,) + (1,) * (rows.ndim - 1))
    return jnp.where(mask, jnp.roll(rows, 1, axis=0), rows)

  return batch["image"], partner(batch["image"]), labels, partner(labels)


def _probabilities(labels: jax.Array, classes: int) -> jax.Array:
  """Returns probabilities [rows, classes]; a row of zeros for an example without a label."""
  labels = jnp.asarray(labels)
  if jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim == 1:
    # A negative label gives a row of zeros.
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)
  if jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == 2 and labels.shape[1] == classes:
    return labels
  expected = f"integers [rows] or probabilities [rows, {classes}]"
  raise ValueError(f"label: expected {expected}, got {labels.dtype} {list(labels.shape)}")


def _check_mixer(alpha: float, classes: int) -> None:
  if not 0 < alpha < float("inf"):
    raise ValueError(f"alpha: expected a finite number > 0, got {alpha}")
  check_integer("classes", classes, 1)


def _require(batch: Batch, *names: str) -> None:
  missing = [name for name in names if name not in batch]
  if missing:
    raise ValueError(f"{missing[0]}: expected an entry of the batch, got only {sorted(batch)}")
