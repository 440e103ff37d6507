"""Crops images, label maps and boxes of an example alike, on the device.

The transforms here are for `augmentation(..., entries={"image": "image", "label": "label_map"})`.
Positions outside of an image take a fill value, and those of its label map the ignore label, so
that they count in no loss and no metric. `crops` crops encoded images on the host instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.moved_boxes import (
  MIN_VISIBLE,
  Window,
  check_min_visible,
  crop_boxes,
  move_boxes,
)
from distill_jax.errors import check_integer

Transform = Callable[..., jax.Array]


def shift_crop(padding: int, *, min_visible: float = MIN_VISIBLE) -> Transform:
  """Pads every side and crops the original size at a uniformly random position.

  He et al. 2016 (section 4.2) train CIFAR networks with padding 4 and `flip`. Images are padded
  with zeros; label maps with `UNLABELED`, unsigned ones with their largest value (255) and bools
  with False; boxes are clipped or dropped. Volumes and clips are shifted in height and width.

  Args:
    padding: largest shift in pixels of the first entry.
    min_visible: as of `random_crop`.

  Raises:
    ValueError: `padding` is negative, or `min_visible` not in 0..1; when called, `padding` is not
      smaller than the image (a shift could hide all of it), or an entry's size is no multiple of
      the first's.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> augment = data.augmentation(data.shift_crop(2), seed=0)
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augment(batch)["image"].shape
  (2, 4, 4, 1)
  """
  if padding < 0:
    raise ValueError(f"padding: expected a number >= 0, got {padding}")
  check_min_visible(min_visible)

  def transform(key, values, kind="image", size=None):
    sides = (size or values.shape[:-1])[-2:]
    if padding >= min(sides):
      raise ValueError(
        f"padding: expected less than the sides of the image {tuple(sides)}, got {padding}"
      )
    start = jax.random.randint(key, (2,), 0, 2 * padding + 1, jnp.int32) - padding
    window = Window(start, sides, sides)
    return _crop(values, kind, size or values.shape[:-1], window, 0.0, min_visible)

  return transform


def random_crop(
  size: int | Sequence[int],
  *,
  scale: tuple[float, float] = (1.0, 1.0),
  fill: float = 0.0,
  min_visible: float = MIN_VISIBLE,
) -> Transform:
  """Resizes by a random factor and crops a window at a uniformly random position.

  Images are resized by antialiased bilinear interpolation, label maps by their nearest pixel. Where
  the window is larger than the resized image, the image is at a random position in it: the rest of
  an image is `fill`, and that of a label map `UNLABELED`, for unsigned ones their largest value
  (255) and for bools False. Boxes are resized, moved and clipped; hidden ones become zeros, which
  have no area and count nowhere.

  Args:
    size: side of the window in pixels of the first entry, or (height, width), or (depth, height,
      width). Without a depth, volumes and clips keep theirs.
    scale: smallest and largest factor, e.g. (0.5, 2); it is uniform between them.
    fill: value of an image's pixels outside of the image.
    min_visible: boxes of which less than this part of the area is in the window are dropped; with
      0, those without any area in it.

  Raises:
    ValueError: `size` is not 1 to 3 sides of at least 1, `scale` no range of positive numbers, or
      `min_visible` not in 0..1; when called, images of integers are resized, or an entry's size is
      no multiple of the first's.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> kinds = {"image": "image", "label": "label_map"}
  >>> augment = data.augmentation(data.random_crop(6), seed=0, entries=kinds)
  >>> batch = {"image": jnp.ones((1, 8, 4, 3)), "label": jnp.ones((1, 8, 4), int)}
  >>> view = augment(batch | {"id": jnp.arange(1), "view": jnp.zeros(1, int)})
  >>> view["image"].shape, (view["label"] == data.UNLABELED).sum().item()  # 6 rows, 2 columns
  ((1, 6, 6, 3), 12)
  """
  sides = check_sides(size)
  low, high = check_scale(scale)
  check_min_visible(min_visible)

  def transform(key, values, kind="image", size=None):
    source, shape = _source_and_shape(size or values.shape[:-1], sides)
    scale_key, start_key = jax.random.split(key)
    target = None
    if low != 1 or high != 1:
      factor = jax.random.uniform(scale_key, (), jnp.float32, low, high)
      rounded = jnp.round(factor * jnp.asarray(source, jnp.float32))
      target = jnp.maximum(rounded, 1).astype(jnp.int32)
    resized = jnp.asarray(source if target is None else target, jnp.int32)
    room = resized - jnp.asarray(shape, jnp.int32)
    least, most = jnp.minimum(room, 0), jnp.maximum(room, 0)
    start = jax.random.randint(start_key, (len(shape),), least, most + 1, jnp.int32)
    window = Window(start, shape, source, target)
    return _crop(values, kind, size or values.shape[:-1], window, fill, min_visible)

  return transform


def center_crop(
  size: int | Sequence[int], *, fill: float = 0.0, min_visible: float = MIN_VISIBLE
) -> Transform:
  """Crops the central window, or pads all sides where the window is larger than the image.

  Args:
    size, fill, min_visible: as of `random_crop`.

  Raises:
    ValueError: as `random_crop`.

  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> augment = data.augmentation(data.center_crop(2), seed=0)
  >>> image = jnp.arange(16.0).reshape(1, 4, 4)
  >>> augment({"image": image, "id": jnp.arange(1), "view": jnp.zeros(1, int)})["image"].tolist()
  [[[5.0, 6.0], [9.0, 10.0]]]
  """
  sides = check_sides(size)
  check_min_visible(min_visible)

  def transform(key, values, kind="image", size=None):
    source, shape = _source_and_shape(size or values.shape[:-1], sides)
    # An odd pixel is cut, or added, at the end.
    start = [(a - b) // 2 if a > b else -((b - a) // 2) for a, b in zip(source, shape)]
    window = Window(jnp.asarray(start, jnp.int32), shape, source)
    return _crop(values, kind, size or values.shape[:-1], window, fill, min_visible)

  return transform


def _crop(
  values: jax.Array,
  kind: str,
  size: Sequence[int],
  window: Window,
  fill: float,
  min_visible: float,
) -> jax.Array:
  """Returns the window of an entry; `size` and `window` are in pixels of the first entry."""
  if kind == "boxes":
    return move_boxes(values, lambda boxes: crop_boxes(boxes, window, min_visible))
  window = _enlarge(window, _pixels_per_pixel(values.shape, size))
  first_axis = values.ndim - 1 - len(window.shape)
  if kind == "label_map":
    return _take(values, first_axis, window, _ignore_label(values.dtype))
  if window.target is None:
    return _take(values, first_axis, window, fill)
  return _interpolate(values, first_axis, window, fill)


def _enlarge(window: Window, factor: int) -> Window:
  """Returns the window in pixels of an entry that is higher and wider by a factor."""
  # A depth is not larger than the first entry's.
  factors = (1,) * (len(window.shape) - 2) + (factor, factor)

  def enlarge(sides):
    return [f * side for f, side in zip(factors, sides)]

  target = None if window.target is None else enlarge(window.target)
  return Window(enlarge(window.start), enlarge(window.shape), enlarge(window.source), target)


def _take(values: jax.Array, first_axis: int, window: Window, fill: float) -> jax.Array:
  """Returns the nearest pixel at each position of the window."""
  target = window.source if window.target is None else window.target
  sides = zip(window.start, window.shape, window.source, target)
  for axis, (start, length, source, resized) in enumerate(sides, first_axis):
    position = start + jnp.arange(length, dtype=jnp.int32)
    # Integers: a float32 quotient could be below the next whole number.
    index = (2 * position + 1) * source // (2 * resized)
    is_inside = (index >= 0) & (index < source)
    taken = jnp.take(values, jnp.clip(index, 0, source - 1), axis=axis)
    mask = jax.lax.expand_dims(is_inside, [i for i in range(values.ndim) if i != axis])
    values = jnp.where(mask, taken, jnp.asarray(fill).astype(values.dtype))
  return values


def _interpolate(values: jax.Array, first_axis: int, window: Window, fill: float) -> jax.Array:
  """Returns the window by bilinear interpolation."""
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise ValueError(
      f"random_crop: expected images of floats for scale=, got {values.dtype}: scale them"
    )
  axes = range(first_axis, values.ndim - 1)
  shape = values.shape[:first_axis] + tuple(window.shape) + values.shape[-1:]
  assert window.target is not None
  scale = jnp.asarray(window.target, jnp.float32) / jnp.asarray(window.source, jnp.float32)
  translation = -jnp.asarray(window.start, jnp.float32)
  # Pixels outside of the image are 0.
  result = jax.image.scale_and_translate(
    values.astype(jnp.float32) - fill, shape, axes, scale, translation, "linear"
  )
  return (result + fill).astype(values.dtype)


def _source_and_shape(
  size: Sequence[int], sides: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
  """Returns the sizes of the axes that are cropped, and those of the window."""
  if len(sides) > len(size):
    raise ValueError(
      f"size: expected (height, width) for images {list(size)}, got {tuple(sides)}: a depth is for "
      "volumes [B, D, H, W, channels]"
    )
  return tuple(size[len(size) - len(sides) :]), sides


def check_sides(size: int | Sequence[int]) -> tuple[int, ...]:
  """Returns (height, width) or (depth, height, width), at least 1; raises a ValueError else."""
  sides = tuple(size) if isinstance(size, Sequence) else (size, size)
  if len(sides) not in (2, 3):
    raise ValueError(
      f"size: expected a side, (height, width) or (depth, height, width), got {sides}"
    )
  return tuple(check_integer("size", side, 1) for side in sides)


def check_scale(scale: Any) -> tuple[float, float]:
  """Returns a range of factors; raises a ValueError unless 0 < low <= high."""
  is_pair = isinstance(scale, Sequence) and len(scale) == 2
  if not is_pair or not 0 < scale[0] <= scale[1] < float("inf"):
    raise ValueError(
      f"scale: expected a range (low, high) with 0 < low <= high, got {scale}: write (0.5, 2.0)"
    )
  return scale[0], scale[1]


def _pixels_per_pixel(shape: Sequence[int], size: Sequence[int]) -> int:
  """Returns how many times higher and wider an entry is than the first one."""
  factor = shape[-2] // size[-1]
  if (*size[:-2], factor * size[-2], factor * size[-1]) != tuple(shape[:-1]):
    raise ValueError(
      f"entries: expected sizes that are multiples of the first entry's {tuple(size)}, got "
      f"{tuple(shape[:-1])}: name the smallest image first"
    )
  return factor


def _ignore_label(dtype: Any) -> int:
  """Returns the value of pixels of a label map that were outside the image."""
  if dtype == jnp.bool_:
    return 0
  return UNLABELED if jnp.issubdtype(dtype, jnp.signedinteger) else int(jnp.iinfo(dtype).max)
