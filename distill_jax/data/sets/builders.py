"""TFDS's own builders of small sets, prepared without TensorFlow, from a folder where there is no network.

TFDS reads and unpacks source files with TensorFlow. These builders change nothing but how files are found and
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
  """A builder class of the same name that needs no TensorFlow; None if there is none here.

  Args:
    builder: TFDS's.
    source_files: a folder with the files that it would download; None: download them (MNIST's family only:
      CIFAR comes as an archive, which TFDS unpacks with TensorFlow).
  """
  mixin = FROM_FILES.get(builder.name)
  if mixin is None or (mixin is _Cifar and source_files is None):
    return None
  fields = {"name": builder.name, "source_files": source_files, "__module__": builder.__module__}
  return type(builder)(builder.__name__, (mixin, builder), fields, skip_registration=True)


def read_idx(path: Path) -> np.ndarray:
  """The uint8 array of a file in MNIST's IDX format, gzipped or not.

  Raises:
    ValueError: it is not such a file, or its length is not what its header says.
  """
  try:
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f"{path.name} is damaged: {error}") from error
  if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
    raise ValueError(f"{path.name} is no IDX file of bytes: it starts with {content[:4]!r}")
  shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
  values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
  if values.size != np.prod(shape):
    raise ValueError(f"{path.name} holds {values.size} values, its header says {shape}")
  return values.reshape(shape)


class _Idx:
  """MNIST and the sets in its format."""

  FILES = {"train": "train", "test": "t10k"}
  source_files: Path | None
  URL: str

  def _split_generators(self, downloads) -> dict[str, Iterator[Record]]:
    names = [
      f"{part}-{kind}-ubyte.gz"
      for part in self.FILES.values()
      for kind in ("images-idx3", "labels-idx1")
    ]
    if self.source_files is None:
      files = downloads.download({name: urljoin(self.URL, name) for name in names})
    else:
      files = _find(self.source_files, names)
    return {
      split: self._generate_examples(*_pair(files, part)) for split, part in self.FILES.items()
    }

  def _generate_examples(self, images: Path, labels: Path) -> Iterator[Record]:
    pictures, classes = read_idx(Path(images)), read_idx(Path(labels))
    if pictures.shape != (len(classes), 28, 28):
      raise ValueError(
        f"{images.name} has shape {list(pictures.shape)}, expected {[len(classes), 28, 28]}"
      )
    for i, (image, label) in enumerate(zip(pictures, classes)):
      yield i, {"image": PIL.Image.fromarray(image), "label": int(label)}


class _Cifar:
  """CIFAR-10 and CIFAR-100, from the unpacked files of their binary version."""

  source_files: Path
  _cifar_info: Any
  info: Any

  def _split_generators(self, downloads) -> dict[str, Iterator[Record]]:
    about = self._cifar_info
    files = _find(self.source_files, [*about.label_files, *about.train_files, *about.test_files])
    for key, name in zip(about.label_keys, about.label_files):
      self.info.features[key].names = files[name].read_text().split()
    return {
      "train": self._generate_examples("train_", [files[name] for name in about.train_files]),
      "test": self._generate_examples("test_", [files[name] for name in about.test_files]),
    }

  def _generate_examples(self, prefix: str, paths: list[Path]) -> Iterator[Record]:
    keys = self._cifar_info.label_keys
    rows = np.concatenate([_cifar_rows(path, len(keys) + 3072) for path in paths])
    for i, row in enumerate(rows):
      labels = {key: int(label) for key, label in zip(keys, row)}
      image = PIL.Image.fromarray(row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0).copy())
      yield i, {"id": f"{prefix}{i:05d}", "image": image, **labels}


FROM_FILES: dict[str, type] = {
  "mnist": _Idx,
  "fashion_mnist": _Idx,
  "kmnist": _Idx,
  "cifar10": _Cifar,
  "cifar100": _Cifar,
}
"""The sets that can be prepared here from a folder of source files."""


def _cifar_rows(path: Path, width: int) -> np.ndarray:
  values = np.frombuffer(path.read_bytes(), np.uint8)
  if not values.size or values.size % width:
    raise ValueError(
      f"{path.name} has {values.size} bytes, expected a multiple of {width}: a label and an image"
    )
  return values.reshape(-1, width)


def _pair(files: dict[str, Path], part: str) -> tuple[Path, Path]:
  return files[f"{part}-images-idx3-ubyte.gz"], files[f"{part}-labels-idx1-ubyte.gz"]


def _find(folder: Path, names: list[str]) -> dict[str, Path]:
  """The files of these names in a folder; a file without '.gz' will do too."""
  if not folder.is_dir():
    raise FileNotFoundError(f"source_files: there is no folder {folder}")
  choices = {name: (folder / name, folder / name.removesuffix(".gz")) for name in names}
  found = {name: path for name, paths in choices.items() for path in paths if path.is_file()}
  missing = [name for name in names if name not in found]
  if missing:
    raise FileNotFoundError(f"source_files: {folder} has no {', '.join(missing)}")
  return found
