"""Loads gray and white matter of the MNI152 template, which comes with nilearn, without download.

It is ONE brain: the average of the T1-weighted images of 152 young adults (ICBM 2009a nonlinear
symmetric, Fonov et al. 2009), whose labels are averaged maps as well, and whose halves mirror each
other. Scores on it compare networks with one another; they say nothing about another person's scan.

    pip install --no-deps nilearn
"""

import gzip
import importlib.util
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from distill_jax.data.source import Source

CLASSES = ("background", "gray matter", "white matter")
SHAPE = (197, 233, 189)
FIRST, PERIOD, SLABS = 28, 36, 5
"""The first coronal slice with brain in it, and the slices and number of the periods that follow.

A period has 20 slices for training, a gap of 4, a slab of 8 that is held out, and a gap of 4."""
TRAINING, GAP, HELD_OUT = 20, 4, 8
VALIDATION = (1, 3)
"""The periods whose slabs are for validation; the others' are the test set."""
# All brain is in these columns (left to right) and rows (bottom to top) of a slice.
COLUMNS, ROWS = slice(26, 170), slice(0, 160)
_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_HEADER = 348


def load() -> dict[str, Source]:
  """Returns the brain in coronal slices of 1 mm, 160 x 144 pixels of 1 mm.

  Slabs for training, validation and test alternate along the brain, from back to front, with gaps
  of 4 mm between them: no slice of a held-out slab touches one of training, though slices 5 mm from
  each other still look alike. A pixel's class is the most probable one of gray matter, white matter
  and the rest (air, fluid, and all else), by the template's maps.

  Entries of a slice: 'image' float32 [160, 144, 1] in 0..1, 'label' [160, 144], 'slab' (its
  number) and 'slice' (its position in the slab); its id is the position in the brain.

  Returns:
    `{'train': Source, 'validation': Source, 'test': Source}` of 5 slabs of 20 slices, 2 of 8, and 3
    of 8; each slab is a group.

  Raises:
    ImportError: nilearn is not installed.
    ValueError: its files are no volumes of this template.
  """
  folder = _find_package()
  t1, gray, white = (_slices(folder / _FILE.format(name)) for name in ("t1", "gm", "wm"))
  # Sums of the two maps reach 255.
  rest = 255 - np.minimum(gray.astype(np.int32) + white, 255)
  label = np.argmax([rest, gray, white], 0).astype(np.int32)
  image = (t1 / np.float32(255))[..., None]
  return {
    name: _take(name, image, label, slabs)
    for name, slabs in (
      ("train", range(0, 2 * SLABS, 2)),
      ("validation", [2 * period + 1 for period in VALIDATION]),
      ("test", [2 * period + 1 for period in range(SLABS) if period not in VALIDATION]),
    )
  }


def read_nifti(path: Path) -> np.ndarray:
  """Returns the uint8 volume of a NIfTI-1 file, gzipped or not, [x, y, z].

  Raises:
    ValueError: it is no such file, its voxels are no uint8, or it is cut short.
  """
  content = path.read_bytes()
  try:
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f"{path.name} is corrupt: {error}") from error
  if len(content) < _HEADER + 4 or content[344:348] != b"n+1\0":
    raise ValueError(f"{path.name}: expected a NIfTI-1 file, got another: install nilearn again")
  axes, *shape = np.frombuffer(content, "<i2", 4, 40).tolist()
  datatype = int(np.frombuffer(content, "<i2", 1, 70)[0])
  if axes != 3 or datatype != 2:
    raise ValueError(
      f"{path.name}: expected uint8 voxels (type 2) on 3 axes, got type {datatype} on {axes}"
    )
  start = int(np.frombuffer(content, "<f4", 1, 108)[0])
  count = int(np.prod(shape))
  if len(content) < start + count:
    raise ValueError(
      f"{path.name} is corrupt: expected {count} voxels by its header, got {len(content) - start}"
    )
  return np.frombuffer(content, np.uint8, count, start).reshape(shape, order="F")


def _find_package() -> Path:
  spec = importlib.util.find_spec("nilearn")
  if spec is None or not spec.submodule_search_locations:
    raise ImportError("mni152 needs nilearn's files: pip install --no-deps nilearn")
  return Path(spec.submodule_search_locations[0])


def _slices(path: Path) -> np.ndarray:
  """Returns the coronal slices [233, 160, 144] of a volume, the top of the head first."""
  volume = read_nifti(path)
  if volume.shape != SHAPE:
    raise ValueError(f"{path.name}: expected a volume {SHAPE}, got {volume.shape}")
  return volume[COLUMNS, :, ROWS].transpose(1, 2, 0)[:, ::-1]


def _take(name: str, image: np.ndarray, label: np.ndarray, slabs: Iterable[int]) -> Source:
  ids: list[int] = []
  numbers: list[int] = []
  places: list[int] = []
  for slab in slabs:
    start = FIRST + slab // 2 * PERIOD + (TRAINING + GAP) * (slab % 2)
    length = HELD_OUT if slab % 2 else TRAINING
    ids += range(start, start + length)
    numbers += [slab] * length
    places += range(length)
  arrays = {
    "id": np.array(ids),
    "image": image[ids],
    "label": label[ids],
    "slab": np.array(numbers),
    "slice": np.array(places),
  }
  return Source(arrays, classes=len(CLASSES), class_names=CLASSES, name="mni152", groups="slab")
