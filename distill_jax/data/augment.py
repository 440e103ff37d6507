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
from distill_jax.data.moved_boxes import move_boxes
from distill_jax.types import Batch

Transform = Callable[..., jax.Array]
"""`(key, image [height, width, channels]) -> image` of the same shape and dtype."""
Size = tuple[int, ...]


def augmentation(
  *transforms: Transform, seed: int, entries: Sequence[str] | Mapping[str, str] | None = None
) -> Callable[[Batch], Batch]:
  """Composes transforms of one image into a function of a batch.

  A transform is a function `(key, image) -> image` of one example, [height, width, channels], in
  `jax.numpy`. `key` is its random key: that of transform i of an example is
  `fold_in(fold_in(fold_in(key(seed), id), view), i)`, always of Threefry, since other generators
  give a row other numbers if the rest of its batch changes. All entries of an example share the
  key, so that they are moved alike. One that is to change label maps and boxes too also takes
  `kind` ('image', 'label_map' or 'boxes') and `size`, (height, width) of the first entry, and may
  then return entries of another height and width, as a crop does. Volumes and clips [B, D, H, W,
  channels] come as [depth, height, width, channels], with `size` (depth, height, width).

  Args:
    *transforms: applied in this order, e.g. `shift_crop(4), flip()`; by default the identity.
    seed: from 0 to 2^32 - 1.
    entries: what is changed: names of images, or name -> kind, `{"image": "image", "label":
      "label_map", "boxes": "boxes"}`. Images are [B, H, W, channels], [B, H, W], or volumes and
      clips [B, D, H, W, channels]; label maps integers [B, H, W] or [B, D, H, W]; boxes [B, N, 4],
      (left, top, right, bottom) in pixels of the first entry, and rows without an area stay. Later
      entries may be higher and wider than the first, by a whole number. None: 'image'; a batch
      with other images, label maps or boxes then raises.

  Returns:
    `batch -> batch` that changes these entries only. It reads 'id' and 'view', int [rows].

  Raises:
    ValueError: `seed` is out of its range, or a kind is unknown; when called, the batch lacks an
      entry, an entry has another shape, or a transform returns another shape or needs numpy.

  >>> from distill_jax import data
  >>> batch = {"image": jnp.ones((2, 8, 8, 1)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> data.augmentation(data.shift_crop(1), data.flip(), seed=0)(batch)["image"].shape
  (2, 8, 8, 1)
  """
  check_seed(seed)
  targets = make_entries(entries)

  def augment(batch: Batch) -> Batch:
    if not transforms:
      return batch
    targets.check(batch, volumes=True)
    missing = [name for name in ("id", "view") if name not in batch]
    if missing:
      raise ValueError(f"{missing[0]}: expected an entry of the batch, got only {sorted(batch)}")
    size = targets.size(batch)

    def augment_example(values, id, view):
      key = jax.random.key(seed, impl="threefry2x32")
      key = jax.random.fold_in(jax.random.fold_in(key, id), view)
      current_size = size
      for i, transform in enumerate(transforms):
        step_key = jax.random.fold_in(key, i)
        changed = {
          name: _apply(transform, step_key, name, values[name], kind, current_size)
          for name, kind in targets.kinds.items()
        }
        _check_alike(transform, values, changed, targets.maps)
        first = targets.maps[0]
        current_size = changed[first].shape[: len(size)]
        values = changed
      return values

    values = {name: jnp.asarray(batch[name]) for name in targets.kinds}
    return {**batch, **jax.vmap(augment_example)(values, batch["id"], batch["view"])}

  return augment


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
      first, last, length = (1, 3, size[-2]) if up_down else (0, 2, size[-1])

      def mirror(boxes):
        low, high = length - boxes[:, last], length - boxes[:, first]
        return boxes.at[:, first].set(low).at[:, last].set(high)

      return jnp.where(flipped, move_boxes(values, mirror), values)
    return jnp.where(flipped, jnp.flip(values, -3 if up_down else -2), values)

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
    size = size or values.shape[:-1]
    if size[-2] != size[-1]:
      raise ValueError(f"rotate90: expected square images, got {tuple(size)}: crop them first")
    turns = jax.random.randint(key, (), 0, 4, jnp.int32)

    def turn(x):
      if kind != "boxes":
        return jnp.rot90(x, axes=(-3, -2))
      return move_boxes(
        x,
        lambda boxes: jnp.stack(
          [boxes[:, 1], size[-1] - boxes[:, 2], boxes[:, 3], size[-1] - boxes[:, 0]], 1
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
  is_flat = kind != "boxes" and values.ndim == len(size)
  image = values[..., None] if is_flat else values
  options: dict[str, Any] = {"kind": kind, "size": size} if _takes_kind(transform) else {}
  label = _name(transform)
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
  shape = jnp.shape(result)
  # A transform that knows the kinds may crop images and maps: `_check_alike` compares them.
  is_crop = (
    options and kind != "boxes" and len(shape) == image.ndim and shape[-1] == image.shape[-1]
  )
  if (shape != image.shape and not is_crop) or result.dtype != image.dtype:
    got = f"{getattr(result, 'dtype', type(result).__name__)} {list(shape)}"
    raise ValueError(
      f"transforms: expected {label} to keep {image.dtype} {list(image.shape)} of {name!r}, got "
      f"{got}"
    )
  return result[..., 0] if is_flat else result


def _check_alike(
  transform: Transform,
  before: Mapping[str, jax.Array],
  after: Mapping[str, jax.Array],
  names: Sequence[str],
) -> None:
  """Checks that a transform has changed height and width of all entries by the same factors."""
  first, *others = names
  for name in others:
    ratios = zip(before[first].shape, after[first].shape, before[name].shape, after[name].shape)
    if any(old * new_other != new * old_other for old, new, old_other, new_other in ratios):
      raise ValueError(
        f"transforms: expected {_name(transform)} to change the sizes of all entries alike, got "
        f"{list(after[first].shape)} of {first!r} and {list(after[name].shape)} of {name!r}: crop "
        "every kind"
      )


def _name(transform: Transform) -> str:
  return getattr(transform, "__qualname__", type(transform).__qualname__)


def _takes_kind(transform: Transform) -> bool:
  try:
    return "kind" in inspect.signature(transform).parameters
  except (TypeError, ValueError):
    return False
