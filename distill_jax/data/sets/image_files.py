"""Reads the images of data sets whose labels are positions of pixels, and pads them."""

from pathlib import Path

import numpy as np

from distill_jax.data.crops import pixels
from distill_jax.data.images import decode_image, orientation


def read(file: Path, channels: int, max_pixels: int, labels: str) -> np.ndarray:
  """Returns an image, float32 [height, width, channels] in 0..1, that is stored upright.

  Args:
    file: the image.
    channels: 3 (RGB) or 1 (gray).
    max_pixels: largest height times width.
    labels: what an error calls the labels of an image, e.g. 'mask'.

  Raises:
    ValueError: it cannot be read or decoded, or is turned by its EXIF entry.
  """
  try:
    encoded = file.read_bytes()
    turned = orientation(encoded)
    image = decode_image(encoded, channels, max_pixels)
  # Pillow's decoders raise nearly any exception on corrupt files.
  except Exception as error:
    raise ValueError(
      f"{file}: expected an image, got a file that cannot be read: {error}"
    ) from error
  if turned != 1:
    raise ValueError(
      f"{file}: expected an image that is stored upright, got the EXIF orientation {turned}: its "
      f"{labels} may be turned or not, so save it upright"
    )
  return pixels(image)


def pad(values: np.ndarray, sides: tuple[int, int], fill: int, file: Path) -> np.ndarray:
  """Returns an image or a label map, padded at the bottom and on the right.

  Raises:
    ValueError: it is larger than (height, width); the error names the file.
  """
  missing = [side - length for side, length in zip(sides, values.shape)]
  if min(missing) < 0:
    raise ValueError(
      f"pad_to: expected at least the size of every image, got {tuple(sides)}, less than "
      f"{size_of(values)} of {file}: write a larger one"
    )
  widths = [(0, width) for width in missing] + [(0, 0)] * (values.ndim - 2)
  return np.pad(values, widths, constant_values=fill)


def check_same_size(image: np.ndarray, first: np.ndarray, file: Path) -> None:
  """Raises a ValueError unless two images have the same size, which is not padded."""
  if image.shape != first.shape:
    sides = np.max([[*image.shape[:2]], [*first.shape[:2]]], axis=0)
    raise ValueError(
      f"{file}: expected images of one size, got {size_of(image)} after {size_of(first)}: write "
      f"pad_to=({sides[0]}, {sides[1]}), and train on data.random_crop(...)"
    )


def size_of(values: np.ndarray) -> str:
  """Returns height and width for a message."""
  return f"{values.shape[0]} x {values.shape[1]}"
