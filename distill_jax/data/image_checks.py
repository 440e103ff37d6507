"""Notices images that a model would read wrongly: pixels of 0 to 255, and channels first."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

MAX_SCALED = 16  # Standardized pixels stay far below it.


def check_images(
  batch: Mapping[str, Any], entries_read: Callable[[], Collection[str]], field: str = "source"
) -> None:
  """Checks the images of a batch that a model reads.

  Images are entries [B, H, W, channels], 'image', and uint8 [B, H, W]. Floats of 0 to 255 and
  channels first only warn, since a model may scale or transpose its inputs itself.

  Args:
    batch: arrays [B, ...].
    entries_read: returns the names of the entries that the model reads; called if an image is
      suspicious.
    field: what an error names first.

  Raises:
    ValueError: an image is uint8.
  """
  images = {name: np.asarray(x) for name, x in batch.items() if not name.startswith("teacher/")}
  images = {name: x for name, x in images.items() if _is_image(name, x)}
  suspicious = {
    name: x for name, x in images.items() if x.dtype == np.uint8 or _is_large(x) or _is_nchw(x)
  }
  read = entries_read() if suspicious else ()
  for name, values in suspicious.items():
    if name not in read:
      continue
    if values.dtype == np.uint8:
      raise ValueError(
        f"{field}: {name}: expected floats, got uint8 pixels of 0 to 255: write "
        f"({name} / 255).astype('float32'), or {name}.astype('float32') for a model that scales "
        "its inputs itself"
      )
    if _is_large(values):
      warnings.warn(
        f"{field}: {name}: expected pixels of about 0 to 1, got 0 to {values.max():.0f}: write "
        f"{name} / 255 unless the model scales its inputs itself",
        stacklevel=2,
      )
    if _is_nchw(values):
      warnings.warn(
        f"{field}: {name}: expected channels last, [B, H, W, channels], got {list(values.shape)}: "
        f"write np.moveaxis({name}, 1, -1) unless the model takes channels first",
        stacklevel=2,
      )


def _is_image(name: str, values: np.ndarray) -> bool:
  return values.ndim == 4 or name == "image" or (values.ndim == 3 and values.dtype == np.uint8)


def _is_large(values: np.ndarray) -> bool:
  is_float = jnp.issubdtype(values.dtype, jnp.floating)
  return bool(is_float and values.size and values.min() >= 0 and values.max() > MAX_SCALED)


def _is_nchw(values: np.ndarray) -> bool:
  return values.ndim == 4 and values.shape[1] in (1, 3) and min(values.shape[2:]) > 4
