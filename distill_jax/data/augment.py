"""Augments images on the device: a view of an image is a function of (seed, example id, view).

The same three numbers give the same image in every batch, on every device and in every run, so a
cache can hold the outputs of an augmented teacher. `mixing` relates the rows of a batch instead.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.data.augmented_entries import make_entries
from distill_jax.data.checks import check_seed
from distill_jax.data.label_checks import UNLABELED
from distill_jax.types import Batch

Transform = Callable[..., jax.Array]
"""`(key, image [height, width, channels]) -> image` of the same shape and dtype."""
Size = tuple[int, int]


def augmentation(
  *transforms: Transform, seed: int, entries: Sequence[str] | Mapping[str, str] | None = None
) -> Callable[[Batch], Batch]:
  """Composes transforms of one image into a function of a batch.

  A transform is a function `(key, image) -> image` of one example, [height, width, channels], in
  `jax.numpy`. `key` is its random key: that of transform i of an example is
  `fold_in(fold_in(fold_in(key(seed), id), view), i)`, always of Threefry, since other generators
  give a row other numbers if the rest of its batch changes. All entries of an example share the
  key, so that they are moved alike. One that is to change label maps and boxes too also takes
  `kind` ('image', 'label_map' or 'boxes') and `size`, (height, width) of the first entry.

  Args:
    *transforms: applied in this order, e.g. `shift_crop(4), flip()`; by default the identity.
    seed: from 0 to 2^32 - 1.
    entries: what is changed: names of images, or name -> kind, `{"image": "image", "label":
      "label_map", "boxes": "boxes"}`. Images are [B, H, W, channels] or [B, H, W]; label maps
      integers [B, H, W]; boxes [B, N, 4], (left, top, right, bottom) in pixels of the first entry,
      and rows without an area stay. Later entries may be larger than the first, by a whole number.
      None: 'image'; a batch with other images, label maps or boxes then raises.

  Returns:
    `batch -> batch` that changes these entries only. It reads 'id' and 'view', int [rows].

  Raises:
    ValueError: `seed` is out of its range, or a kind is unknown; when called, the batch lacks an
      entry, an entry has another shape, or a transform returns another shape or needs numpy.

  >>> batch = {"image": jnp.ones((2, 8, 8, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augmentation(shift_crop(1), flip(), seed=0)(batch)["image"].shape
  (2, 8, 8, 1)
  """
  check_seed(seed)
  targets = make_entries(entries)

  def augment(batch: Batch) -> Batch:
    if not transforms:
      return batch
    targets.check(batch)
    missing = [name for name in ("id", "view") if name not in batch]
    if missing:
      raise ValueError(f"{missing[0]}: expected an entry of the batch, got only {sorted(batch)}")
    size = targets.size(batch)

    def augment_example(values, id, view):
      key = jax.random.key(seed, impl="threefry2x32")
      key = jax.random.fold_in(jax.random.fold_in(key, id), view)
      for i, transform in enumerate(transforms):
        step_key = jax.random.fold_in(key, i)
        for name, kind in targets.kinds.items():
          values[name] = _apply(transform, step_key, name, values[name], kind, size)
      return values

    values = {name: jnp.asarray(batch[name]) for name in targets.kinds}
    return {**batch, **jax.vmap(augment_example)(values, batch["id"], batch["view"])}

  return augment


def shift_crop(padding: int) -> Transform:
  """Pads every side and crops the original size at a uniformly random position.

  He et al. 2016 (section 4.2) train CIFAR networks with padding 4 and `flip`. Images are padded
  with zeros; label maps with `UNLABELED`, unsigned ones with their largest value (255) and bools
  with False; boxes are clipped.

  Args:
    padding: largest shift in pixels of the first entry.

  Raises:
    ValueError: `padding` is negative; when called, it is not smaller than the image (a shift could
      hide all of it), or an entry's size is no multiple of the first's.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> augment = data.augmentation(data.shift_crop(2), seed=0)
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augment(batch)["image"].shape
  (2, 4, 4, 1)
  """
  if padding < 0:
    raise ValueError(f"padding: expected a number >= 0, got {padding}")

  def transform(key, values, kind="image", size=None):
    size = size or values.shape[:2]
    if padding >= min(size):
      raise ValueError(
        f"padding: expected less than the sides of the image {tuple(size)}, got {padding}"
      )
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1, jnp.int32)
    if kind == "boxes":
      offset = (padding - jnp.stack([column, row, column, row])[None]).astype(values.dtype)
      limit = jnp.array([[size[1], size[0], size[1], size[0]]], values.dtype)
      return _move(values, lambda boxes: jnp.clip(boxes + offset, 0, limit))
    scale = _scale(values.shape, size)
    width = scale * padding
    fill = _fill(values.dtype) if kind == "label_map" else 0
    padded = jnp.pad(values, ((width, width), (width, width), (0, 0)), constant_values=fill)
    start = (scale * row, scale * column, jnp.int32(0))
    return jax.lax.dynamic_slice(padded, start, values.shape)

  return transform


def flip(up_down: bool = False) -> Transform:
  """Mirrors left and right with probability 1/2; with `up_down`, top and bottom instead.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> augment = data.augmentation(data.flip(), seed=0)
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augment(batch)["image"].shape
  (2, 4, 4, 1)
  """

  def transform(key, values, kind="image", size=None):
    flipped = jax.random.bits(key, (), jnp.uint32) & 1
    if kind == "boxes":
      first, last, length = (1, 3, size[0]) if up_down else (0, 2, size[1])

      def mirror(boxes):
        low, high = length - boxes[:, last], length - boxes[:, first]
        return boxes.at[:, first].set(low).at[:, last].set(high)

      return jnp.where(flipped, _move(values, mirror), values)
    return jnp.where(flipped, values[::-1] if up_down else values[:, ::-1], values)

  return transform


def rotate90() -> Transform:
  """Rotates square images by 0, 90, 180 or 270 degrees, each with probability 1/4.

  Raises (when called):
    ValueError: an image is not square.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> augment = data.augmentation(data.rotate90(), seed=0)
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augment(batch)["image"].shape
  (2, 4, 4, 1)
  """

  def transform(key, values, kind="image", size=None):
    size = size or values.shape[:2]
    if size[0] != size[1]:
      raise ValueError(f"rotate90: expected square images, got {tuple(size)}: crop them first")
    turns = jax.random.randint(key, (), 0, 4, jnp.int32)

    def turn(x):
      if kind != "boxes":
        return jnp.rot90(x)
      return _move(
        x,
        lambda boxes: jnp.stack(
          [boxes[:, 1], size[1] - boxes[:, 2], boxes[:, 3], size[1] - boxes[:, 0]], 1
        ),
      )

    rotated = [values]
    for _ in range(3):
      rotated.append(turn(rotated[-1]))
    return jnp.stack(rotated)[turns]

  return transform


def brightness(limit: float) -> Transform:
  """Multiplies an image by a factor, uniform in 1 - limit to 1 + limit, without clipping.

  Label maps and boxes stay.

  Args:
    limit: in (0, 1].

  Raises:
    ValueError: `limit` is out of its range; when called, an image holds integers.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> augment = data.augmentation(data.brightness(0.2), seed=0)
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augment(batch)["image"].shape
  (2, 4, 4, 1)
  """
  if not 0 < limit <= 1:
    raise ValueError(f"limit: expected a number in (0, 1], got {limit}")

  def transform(key, values, kind="image", size=None):
    if kind != "image":
      return values
    if not jnp.issubdtype(values.dtype, jnp.floating):
      raise ValueError(f"brightness: expected images of floats, got {values.dtype}: scale them")
    factor = jax.random.uniform(key, (), jnp.float32, 1 - limit, 1 + limit)
    dtype = reduce.common_dtype(values.dtype, jnp.float32)
    return (factor.astype(dtype) * values.astype(dtype)).astype(values.dtype)

  return transform


def _apply(
  transform: Transform, key: jax.Array, name: str, values: jax.Array, kind: str, size: Size
) -> jax.Array:
  """Returns one entry of an example, transformed."""
  # [height, width] is taken as one channel.
  is_flat = kind != "boxes" and values.ndim == 2
  image = values[..., None] if is_flat else values
  options: dict[str, Any] = {"kind": kind, "size": size} if _takes_kind(transform) else {}
  label = getattr(transform, "__qualname__", type(transform).__qualname__)
  if kind != "image" and not options:
    raise ValueError(
      f"transforms: expected some that take kind= and size= for {name!r}, which is of kind "
      f"{kind!r}, got {label}(key, image): add these arguments, or leave {name!r} out of entries"
    )
  try:
    result = transform(key, image, **options)
  except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
    raise ValueError(
      f"transforms: expected functions of jax.numpy, got {label}, which needs the values of "
      f"{name!r} on the host: use jax.numpy, or transform the examples before they are batched"
    ) from error
  if jnp.shape(result) != image.shape or result.dtype != image.dtype:
    got = f"{getattr(result, 'dtype', type(result).__name__)} {list(jnp.shape(result))}"
    raise ValueError(
      f"transforms: expected {label} to keep {image.dtype} {list(image.shape)} of {name!r}, got "
      f"{got}"
    )
  return result[..., 0] if is_flat else result


def _takes_kind(transform: Transform) -> bool:
  try:
    return "kind" in inspect.signature(transform).parameters
  except (TypeError, ValueError):
    return False


def _move(boxes: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Returns moved boxes [N, 4]; those without an area only fill up the array, and stay."""
  has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
  return jnp.where(has_area[:, None], function(boxes), boxes).astype(boxes.dtype)


def _scale(shape: Sequence[int], size: Size) -> int:
  """Returns how many times larger an entry is than the first one."""
  scale = shape[0] // size[0]
  if (scale * size[0], scale * size[1]) != tuple(shape[:2]):
    raise ValueError(
      f"entries: expected sizes that are multiples of the first entry's {tuple(size)}, got "
      f"{tuple(shape[:2])}: name the smallest image first"
    )
  return scale


def _fill(dtype: Any) -> int:
  """Returns the value of pixels of a label map that were outside the image."""
  if dtype == jnp.bool_:
    return 0
  return UNLABELED if jnp.issubdtype(dtype, jnp.signedinteger) else int(jnp.iinfo(dtype).max)
