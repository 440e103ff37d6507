"""Prepares small sets of TFDS without TensorFlow, by download or from a folder of source files.

TFDS reads and unpacks source files with TensorFlow. These builders replace only how files are
located and
read: name, version, features, keys and therefore the order of the examples stay TFDS's.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import PIL.Image

Record = tuple[int, dict[str, Any]]


def without_tensorflow(builder: Any, source_files: Path | None) -> Any:
  """Returns a builder class of the same name that needs no TensorFlow; None if there is none here.

  Args:
    builder: TFDS's builder class.
    source_files: a folder with the files that it would download; None: download them (only MNIST's
      family:
      CIFAR is an archive, which TFDS unpacks with TensorFlow).
  """
  mixin = FROM_FILES.get(builder.name)
  if mixin is None or (mixin is _Cifar and source_files is None):
    return None
  fields = {"name": builder.name, "source_files": source_files, "__module__": builder.__module__}
  return type(builder)(builder.__name__, (mixin, builder), fields, skip_registration=True)


def read_idx(path: Path) -> np.ndarray:
  """Returns the uint8 array of a file in MNIST's IDX format, gzipped or not.

  Raises:
    ValueError: it is not such a file, or its length differs from the one in its header.
  """
  try:
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f"{path.name} is corrupt: {error}") from error
  if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
    raise ValueError(
      f"{path.name}: expected an IDX file of bytes, got one that starts with {content[:4]!r}"
    )
  shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
  values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
  if values.size != np.prod(shape):
    raise ValueError(
      f"{path.name} is corrupt: expected {shape} values by its header, got {values.size}"
    )
  return values.reshape(shape)


class _Idx:
  """A mixin for MNIST and the sets in its format."""

  FILES = {"train": "train", "test": "t10k"}
  source_files: Path | None
  URL: str

  def _split_generators(self, downloads: Any) -> dict[str, Iterator[Record]]:
    names = [
      f"{part}-{kind}-ubyte.gz"
      for part in self.FILES.values()
      for kind in ("images-idx3", "labels-idx1")
    ]
    if self.source_files is None:
      files = downloads.download({name: urljoin(self.URL, name) for name in names})
    else:
      files = _find_files(self.source_files, names)
    return {
      split: self._generate_examples(*_pair(files, part)) for split, part in self.FILES.items()
    }

  def _generate_examples(self, images: Path, labels: Path) -> Iterator[Record]:
    pixels = read_idx(Path(images))
    classes = read_idx(Path(labels))
    if pixels.shape != (len(classes), 28, 28):
      raise ValueError(
        f"{images.name}: expected shape {[len(classes), 28, 28]}, got {list(pixels.shape)}"
      )
    for i, (image, label) in enumerate(zip(pixels, classes)):
      yield i, {"image": PIL.Image.fromarray(image), "label": int(label)}


class _Cifar:
  """A mixin for CIFAR-10 and CIFAR-100, from the unpacked files of their binary version."""

  source_files: Path
  _cifar_info: Any
  info: Any

  def _split_generators(self, downloads: Any) -> dict[str, Iterator[Record]]:
    info = self._cifar_info
    names = [*info.label_files, *info.train_files, *info.test_files]
    files = _find_files(self.source_files, names)
    for key, name in zip(info.label_keys, info.label_files):
      self.info.features[key].names = files[name].read_text().split()
    return {
      "train": self._generate_examples("train_", [files[name] for name in info.train_files]),
      "test": self._generate_examples("test_", [files[name] for name in info.test_files]),
    }

  def _generate_examples(self, prefix: str, paths: list[Path]) -> Iterator[Record]:
    keys = self._cifar_info.label_keys
    rows = np.concatenate([_cifar_rows(path, len(keys) + 3072) for path in paths])
    for i, row in enumerate(rows):
      labels = {key: int(label) for key, label in zip(keys, row)}
      pixels = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
      image = PIL.Image.fromarray(pixels.copy())
      yield i, {"id": f"{prefix}{i:05d}", "image": image, **labels}


FROM_FILES: dict[str, type] = {
  "mnist": _Idx,
  "fashion_mnist": _Idx,
  "kmnist": _Idx,
  "cifar10": _Cifar,
  "cifar100": _Cifar,
}
"""The mixin of each set that can be prepared here from a folder of source files."""


def _cifar_rows(path: Path, width: int) -> np.ndarray:
  values = np.frombuffer(path.read_bytes(), np.uint8)
  if not values.size or values.size % width:
    raise ValueError(
      f"{path.name}: expected a multiple of {width} bytes, a label and an image each, got "
      f"{values.size}"
    )
  return values.reshape(-1, width)


def _pair(files: dict[str, Path], part: str) -> tuple[Path, Path]:
  return files[f"{part}-images-idx3-ubyte.gz"], files[f"{part}-labels-idx1-ubyte.gz"]


def _find_files(folder: Path, names: list[str]) -> dict[str, Path]:
  """Returns the files of these names in a folder, with or without their suffix '.gz'."""
  if not folder.is_dir():
    raise FileNotFoundError(f"source_files: expected a folder, got {folder}, which does not exist")
  choices = {name: (folder / name, folder / name.removesuffix(".gz")) for name in names}
  paths = {name: path for name, both in choices.items() for path in both if path.is_file()}
  missing = [name for name in names if name not in paths]
  if missing:
    raise FileNotFoundError(f"source_files: expected {', '.join(missing)} in {folder}, got none")
  return paths
