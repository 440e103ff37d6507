"""Notices images that a model would read wrongly: pixels of 0 to 255, channels first, and label
maps whose axes are in another order.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

MAX_SCALED = 16  # Standardized pixels stay far below it.
IMAGE_WORDS = ("image", "img", "pixel", "video", "frame", "photo", "picture")
INDEX_WORDS = ("id", "ids", "token", "tokens", "text", "byte", "bytes", "index", "indices")


def check_images(
  batch: Mapping[str, Any], entries_read: Callable[[], Collection[str]], field: str = "source"
) -> None:
  """Checks the images of a batch that a model reads.

  Images are entries [B, H, W, channels] or with more axes, uint8 or uint16 [B, H, W], and all whose
  name is one of an image or video. Other uint8, floats of 0 to 255 and channels first only warn,
  since a model may embed, scale or transpose its inputs itself.

  Args:
    batch: arrays [B, ...].
    entries_read: returns the names of the entries that the model reads; called if an image is
      suspicious.
    field: what an error names first.

  Raises:
    ValueError: an image is uint8, or other integers above 16; or the axes of 'label' are those of
      an image in another order, which resized logits would fit.
  """
  images = {name: np.asarray(x) for name, x in batch.items() if not name.startswith("teacher/")}
  suspicious = {
    name: x
    for name, x in images.items()
    if _is_bytes(name, x)
    or (_is_image(name, x) and (_is_integer_image(x) or _is_large(x) or _early_channels(x)))
    or _is_swapped(x, images)
  }
  read = entries_read() if suspicious else ()
  for name, values in suspicious.items():
    if name not in read:
      continue
    if _is_swapped(values, images):
      raise ValueError(
        f"{field}: label: expected the axes of {name}, {list(values.shape[:-1])}, got "
        f"{list(images['label'].shape)}: np.transpose one of them"
      )
    scaled = f"({name} / {255 if values.max() <= 255 else values.max()}).astype('float32')"
    if _is_bytes(name, values):
      warnings.warn(
        f"{field}: {name}: expected floats of about 0 to 1, got uint8 of 0 to {values.max()}: "
        f"write {scaled} unless the model embeds or scales its inputs itself",
        stacklevel=2,
      )
    elif _is_integer_image(values):
      raise ValueError(
        f"{field}: {name}: expected floats, got {values.dtype} pixels of 0 to {values.max()}: "
        f"write {scaled}, or {name}.astype('float32') for a model that scales its inputs itself"
      )
    if _is_large(values):
      warnings.warn(
        f"{field}: {name}: expected pixels of about 0 to 1, got 0 to {values.max():.0f}: write "
        f"{name} / 255 unless the model scales its inputs itself",
        stacklevel=2,
      )
    axis = _early_channels(values)
    if axis:
      warnings.warn(
        f"{field}: {name}: expected channels last, [B, ..., channels], got {list(values.shape)}: "
        f"write np.moveaxis({name}, {axis}, -1) unless the model takes channels before the pixels",
        stacklevel=2,
      )


def _is_image(name: str, values: np.ndarray) -> bool:
  is_unsigned = values.dtype in (np.uint8, np.uint16)
  if values.ndim >= 4 or (values.ndim == 3 and is_unsigned):
    return True
  # The last word: 'image_sizes' are none.
  last = name.lower().removesuffix("_values").split("_")[-1]
  return values.ndim >= 2 and last.startswith(IMAGE_WORDS)


def _is_integer_image(values: np.ndarray) -> bool:
  is_integer = np.issubdtype(values.dtype, np.integer)
  return bool(values.dtype == np.uint8 or (is_integer and values.max() > MAX_SCALED))


def _is_bytes(name: str, values: np.ndarray) -> bool:
  """Returns whether an entry holds flat uint8 that may be pixels, by its name."""
  is_index = not set(name.lower().split("_")).isdisjoint(INDEX_WORDS)
  is_flat = values.ndim == 2 and values.dtype == np.uint8 and values.max() > MAX_SCALED
  return bool(is_flat and not is_index and not _is_image(name, values))


def _is_large(values: np.ndarray) -> bool:
  is_float = jnp.issubdtype(values.dtype, jnp.floating)
  return bool(is_float and values.size and values.min() >= 0 and values.max() > MAX_SCALED)


def _is_swapped(values: np.ndarray, entries: Mapping[str, np.ndarray]) -> bool:
  """Returns whether 'label' is a map of an image's sides in another order."""
  label = entries.get("label", np.empty(0))
  is_map = label.ndim == values.ndim - 1 > 2 and np.issubdtype(label.dtype, np.integer)
  sides = values.shape[1:-1]
  return is_map and label.shape[1:] != sides and sorted(label.shape[1:]) == sorted(sides)


def _early_channels(values: np.ndarray) -> int:
  """Returns the axis that looks like the channels of [B, C, H, W], of volumes [B, C, D, H, W] or
  of clips [B, T, C, H, W]; 0 if the channels may be last.
  """
  if values.ndim not in (4, 5) or min(values.shape[-2:]) <= 4:
    return 0
  return next((axis for axis in range(1, values.ndim - 2) if values.shape[axis] in (1, 3)), 0)
