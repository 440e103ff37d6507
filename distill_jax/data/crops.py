"""Crops images of many sizes on the host: a view is a function of (seed, example id, view).

Resampling is Pillow's bilinear filter with antialiasing, applied once to the crop's box in the
image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image

from distill_jax.data.checks import check_seed
from distill_jax.errors import check_integer

Crop = Callable[[Any, int, int], Any]
"""`(image, example id, view) -> float32 [size, size, channels]` in 0..1, the batch's 'image', or a
mapping of several entries."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""
TRIES = 10


def random_resized_crop(
  size: int,
  *,
  seed: int,
  area: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
  """Returns a crop of a random box, resized to a square: Inception's training crop.

  Args:
    size: side of the result in pixels.
    seed: from 0 to 2^32 - 1; the box is sampled by (seed, example id, view).
    area: smallest and largest fraction of the image's area, at most 1.
    ratio: smallest and largest width / height.

  Raises:
    ValueError: `size` is less than 1, or a range is not two positive numbers in order.
  """
  check_seed(seed)
  check_integer("size", size, 1)
  _check_range("area", area, most=1.0)
  _check_range("ratio", ratio)

  def crop(image, id, view):
    sequence = np.random.SeedSequence(seed, spawn_key=(id, view))
    rng = np.random.Generator(np.random.Philox(sequence))
    return _resize(image, crop_box(image.height, image.width, rng, area, ratio), size)

  return crop


def center_crop(size: int, *, fraction: float = 0.875) -> Crop:
  """Returns a crop of the central square, resized: the crop for evaluation.

  Args:
    size: side of the result in pixels.
    fraction: side of the square over the image's shorter side, in (0, 1]. 0.875 is the usual
      "resize to 256, crop 224", without the resampling in between.

  Raises:
    ValueError: `size` is less than 1 or `fraction` is not in (0, 1].
  """
  check_integer("size", size, 1)
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction: expected a number in (0, 1], got {fraction}")

  def crop(image, id, view):
    half = fraction * min(image.size) / 2
    x = image.width / 2
    y = image.height / 2
    return _resize(image, (x - half, y - half, x + half, y + half), size)

  return crop


def crop_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  area: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
  """Returns a random box inside an image of height x width pixels.

  The area is uniform in `area` times the image's and the ratio in [3/4, 4/3] (Szegedy et al. 2015,
  section 6); the ratio's logarithm is uniform, a box that does not fit is sampled again, and after
  10 tries the largest central box of an allowed ratio is taken (torchvision's
  `RandomResizedCrop.get_params`).
  """
  for _ in range(TRIES):
    pixels = height * width * rng.uniform(*area)
    aspect = np.exp(rng.uniform(*np.log(ratio)))
    w = round(np.sqrt(pixels * aspect))
    h = round(np.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return left, top, left + w, top + h
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  left = (width - w) // 2
  top = (height - h) // 2
  return left, top, left + w, top + h


def pixels(image: PIL.Image.Image) -> np.ndarray:
  """Returns float32 [height, width, channels] in 0..1."""
  values = np.asarray(image, np.float32) / 255
  return values if values.ndim == 3 else values[..., None]


def as_entries(result: Any) -> dict[str, np.ndarray]:
  """Returns the batch's entries that a crop made of one image."""
  return dict(result) if isinstance(result, Mapping) else {"image": result}


def _resize(image: PIL.Image.Image, box: Box, size: int) -> np.ndarray:
  return pixels(image.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box))


def _check_range(name: str, limits: Any, most: float = np.inf) -> None:
  if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= most:
    raise ValueError(
      f"{name}: expected a range (low, high) with 0 < low <= high <= {most}, got {limits}"
    )
