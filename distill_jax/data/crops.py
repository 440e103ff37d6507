"""Crops of images of many sizes, made on the host: a view is a function of (seed, example id, view).

Resampling is Pillow's bilinear filter with antialiasing, taken straight from the crop's place in the image.
"""

from collections.abc import Callable

import numpy as np
import PIL.Image

from distill_jax.data.checks import check_seed

Crop = Callable[[PIL.Image.Image, int, int], np.ndarray]
"""`(image, example id, view) -> float32 [size, size, channels]` in 0..1."""
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
  """A random part of the image, resized to a square: Inception's training crop (see `crop_box`).

  Args:
    size: side of the result in pixels.
    seed: from 0 to 2^32 - 1; the part is drawn from (seed, example id, view).
    area: smallest and largest share of the image's area.
    ratio: smallest and largest width / height.

  Raises:
    ValueError: `size` is less than 1, or a range is not two positive numbers in order (shares at most 1).
  """
  check_seed(seed)
  _check_size(size)
  _check_range("area", area, most=1.0)
  _check_range("ratio", ratio)

  def crop(image, id, view):
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(id, view))))
    return _resize(image, crop_box(image.height, image.width, draw, area, ratio), size)

  return crop


def center_crop(size: int, *, share: float = 0.875) -> Crop:
  """The central square, resized: the crop for evaluation.

  Args:
    size: side of the result in pixels.
    share: side of the square over the image's shorter side, 0 to 1. 0.875 is the usual "resize to 256, crop
      224", without the resampling in between.

  Raises:
    ValueError: `size` is less than 1 or `share` is outside (0, 1].
  """
  _check_size(size)
  if not 0 < share <= 1:
    raise ValueError(f"share must be more than 0 and at most 1, got {share}")

  def crop(image, id, view):
    half = share * min(image.size) / 2
    x, y = image.width / 2, image.height / 2
    return _resize(image, (x - half, y - half, x + half, y + half), size)

  return crop


def crop_box(
  height: int,
  width: int,
  draw: np.random.Generator,
  area: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
  """A random box inside an image.

  The area is uniform in `area` times the image's and the ratio in [3/4, 4/3] (Szegedy et al. 2015, section
  6); the ratio's logarithm is uniform, a box that does not fit is drawn again, and after 10 tries the largest
  central box of an allowed ratio is taken (torchvision's `RandomResizedCrop.get_params`).
  """
  for _ in range(TRIES):
    pixels = height * width * draw.uniform(*area)
    shape = np.exp(draw.uniform(*np.log(ratio)))
    w, h = round(np.sqrt(pixels * shape)), round(np.sqrt(pixels / shape))
    if 0 < w <= width and 0 < h <= height:
      top, left = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1)
      return int(left), int(top), int(left) + w, int(top) + h
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def pixels(image: PIL.Image.Image) -> np.ndarray:
  """float32 [height, width, channels] in 0..1."""
  values = np.asarray(image, np.float32) / 255
  return values if values.ndim == 3 else values[..., None]


def _resize(image, box: Box, size: int) -> np.ndarray:
  return pixels(image.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box))


def _check_size(size):
  if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
    raise ValueError(f"size must be a whole number of pixels from 1, got {size!r}")


def _check_range(name, limits, most=np.inf):
  if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= most:
    raise ValueError(
      f"{name} must be a range (low, high) with 0 < low <= high <= {most}, got {limits}"
    )
