"""Loads a folder of images with one subfolder per class."""

import difflib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.data.images import Images
from distill_jax.data.source import Source
from distill_jax.storage import folders

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
  """Returns all images of a folder, float32 in 0..1; arguments and errors as of `images`.

  Files that cannot be decoded are counted in a warning and left out, up to a fraction of `max_bad`.

  Args:
    size: side in pixels to which each central square is resized; None: the images have one size.
  """
  encoded = images(
    path, class_names=class_names, channels=channels, max_pixels=max_pixels, max_bad=max_bad
  )
  return encoded.load(size)


def images(
  path: str | Path,
  *,
  class_names: Sequence[str] = (),
  channels: int = 3,
  max_pixels: int = 50_000_000,
  max_bad: float = 0.01,
) -> Images:
  """Returns the images of a folder, which are read on demand.

  Every subfolder is a class, and holds its images at any depth. Files and folders whose name starts
  with a dot and files without the suffix of an image are ignored. Ids number the files in the order
  of their paths below `path`: a new file changes the ids of those after it.

  The images' identity, by which a run or a cache recognizes its data, is a hash of paths, sizes and
  labels, since the files are read on demand. An image that is replaced by one of the same number of
  bytes is not noticed, in an uncompressed format such as BMP or PPM above all: rename what you
  change. `load` reads all images, and compares every pixel.

  Args:
    path: the folder.
    class_names: the subfolders' names in the order of the class numbers, e.g. the training set's
      for a test set. By default the subfolders in alphabetical order.
    channels: 3 (RGB) or 1 (gray).
    max_pixels: largest height times width of an image.
    max_bad: largest fraction of images that cannot be decoded.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it has no subfolders, one has no images, or they are not `class_names`.
  """
  root = folders.resolve(path, "path")
  names = _classes(root, class_names)
  files = [(file, label) for label, name in enumerate(names) for file in _image_files(root / name)]
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


def _classes(root: Path, class_names: Sequence[str]) -> tuple[str, ...]:
  """Returns the names of the classes in their order, checked against the subfolders."""
  if not root.is_dir():
    siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, siblings, n=1)
    hint = f": did you mean {root.parent / near[0]}?" if near else ""
    raise FileNotFoundError(f"path: expected a folder, got {root}, which does not exist{hint}")
  subfolders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  if not subfolders:
    raise ValueError(f"path: expected one subfolder of images per class, got none in {root}")
  if class_names and sorted(class_names) != subfolders:
    missing = sorted({*class_names} - {*subfolders})
    unknown = sorted({*subfolders} - {*class_names})
    raise ValueError(
      f"class_names: expected the subfolders of {root}, got {missing} without a subfolder, and not "
      f"{unknown}, which are subfolders"
    )
  for name in subfolders:
    if root.resolve().is_relative_to((root / name).resolve()):
      raise ValueError(
        f"path: expected one subfolder of images per class, got {root / name}, which is a link to "
        "the folder itself or above: remove it"
      )
  return tuple(class_names) or tuple(subfolders)


def _image_files(folder: Path) -> list[Path]:
  walk = list(os.walk(folder))
  for link in [Path(parent, name) for parent, names, _ in walk for name in names]:
    if link.is_symlink():
      raise ValueError(f"path: expected images, got the link to a folder {link}: link its images")
  files = [
    Path(parent, name)
    for parent, _, names in walk
    for name in names
    if Path(name).suffix.lower() in SUFFIXES
    and not any(part.startswith(".") for part in Path(parent, name).relative_to(folder).parts)
  ]
  if not files:
    raise ValueError(
      f"path: expected files that end in {', '.join(sorted(SUFFIXES))}, got none in the class "
      f"folder {folder}"
    )
  for file in files:
    if not file.is_file():
      raise ValueError(
        f"path: expected images, got {file}, which is no regular file or a link to none: remove it"
      )
  return files


def _fingerprint(root: Path, files: Sequence[tuple[Path, int]]) -> str:
  """Hashes paths, sizes and labels: to read all images takes longer than an epoch of many sets."""
  digest = hashlib.blake2b(digest_size=8)
  for file, label in files:
    digest.update(os.fsencode(file.relative_to(root)))
    digest.update(f"\0{file.stat().st_size}\0{label}\0".encode())
  return digest.hexdigest()
