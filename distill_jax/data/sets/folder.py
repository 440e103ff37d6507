"""A folder of images with one subfolder per class."""

import difflib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.data.images import Images
from distill_jax.data.source import Source

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def load(
  path: str | Path,
  *,
  size: int | None = None,
  class_names: Sequence[str] = (),
  channels: int = 3,
  max_pixels: int = 50_000_000,
  max_bad: float = 0.01,
) -> Source:
  """All images of a folder in memory; see `images` for the arguments and errors, `Images.load` for `size`.

  Files that cannot be decoded are counted in a warning and left out, up to a share of `max_bad`.
  """
  found = images(
    path, class_names=class_names, channels=channels, max_pixels=max_pixels, max_bad=max_bad
  )
  return found.load(size)


def images(
  path: str | Path,
  *,
  class_names: Sequence[str] = (),
  channels: int = 3,
  max_pixels: int = 50_000_000,
  max_bad: float = 0.01,
) -> Images:
  """The images of a folder, read when they are needed.

  Every subfolder is a class, and holds its images at any depth. Files and folders whose name starts with a
  dot and files that have no image's suffix are ignored. Ids number the files in the order of their paths
  below `path`: adding a file renumbers those after it.

  Args:
    path: the folder.
    class_names: the classes in the order of their numbers, e.g. the training set's for a test set; they must
      be the subfolders' names. Without them: the subfolders in alphabetical order.
    channels, max_pixels, max_bad: as in `Images`.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it has no subfolders, one has no images, or they are not `class_names`.
  """
  root = Path(path)
  names = _classes(root, class_names)
  files = [(file, label) for label, name in enumerate(names) for file in _files(root / name)]
  files.sort(key=lambda item: item[0].relative_to(root).parts)

  def read(ids: Sequence[int]) -> list[tuple[bytes, int]]:
    return [(files[id][0].read_bytes(), files[id][1]) for id in ids]

  return Images(
    read,
    np.arange(len(files)),
    len(names),
    names,
    name=root.resolve().name,
    content=_fingerprint(root, files),
    channels=channels,
    max_pixels=max_pixels,
    max_bad=max_bad,
  )


def _classes(root: Path, given: Sequence[str]) -> tuple[str, ...]:
  if not root.is_dir():
    beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, beside, n=1)
    hint = f"; did you mean {root.parent / near[0]}?" if near else ""
    raise FileNotFoundError(f"there is no folder {root}{hint}")
  found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  if not found:
    raise ValueError(f"{root} has no subfolders: expected one per class, with its images")
  if given and sorted(given) != found:
    missing, unknown = sorted({*given} - {*found}), sorted({*found} - {*given})
    raise ValueError(
      f"{root}: class_names without a subfolder: {missing}; subfolders not in class_names: {unknown}"
    )
  return tuple(given) or tuple(found)


def _files(folder: Path) -> list[Path]:
  files = [
    Path(parent, name)
    for parent, _, names in os.walk(folder)
    for name in names
    if Path(name).suffix.lower() in SUFFIXES
    and not any(part.startswith(".") for part in Path(parent, name).relative_to(folder).parts)
  ]
  if not files:
    raise ValueError(
      f"class folder {folder} has no images: expected files that end in {', '.join(sorted(SUFFIXES))}"
    )
  return files


def _fingerprint(root: Path, files) -> str:
  """Of paths, sizes and labels: reading a large set to hash it would take longer than an epoch."""
  digest = hashlib.blake2b(digest_size=8)
  for file, label in files:
    digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0{label}\0".encode())
  return digest.hexdigest()
