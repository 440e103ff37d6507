"""Loads image classification sets of TensorFlow Datasets by name, without TensorFlow."""

import difflib
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from distill_jax.data.images import Images
from distill_jax.data.sets.builders import FROM_FILES, without_tensorflow
from distill_jax.data.source import Source
from distill_jax.errors import suggest
from distill_jax.storage import folders

ORDER = ("train", "validation", "test")
_COPY = (
  "prepare it elsewhere (`tfds build NAME --file_format=array_record`) and copy it to data_dir"
)


def load(
  name: str,
  *,
  splits: Sequence[str] = ("train", "test"),
  size: int | None = None,
  data_dir: str | Path | None = None,
  source_files: str | Path | None = None,
) -> dict[str, Source]:
  """Returns splits of a set, float32 images in 0..1; other arguments and errors as of `images`.

  Args:
    size: side in pixels to which each central square is resized; None: the images have one size.

  Raises:
    ValueError: also where images differ in size and `size` is None, or do not fit in memory.
  """
  encoded = images(name, splits=splits, data_dir=data_dir, source_files=source_files)
  return {split: part.load(size) for split, part in encoded.items()}


def images(
  name: str,
  *,
  splits: Sequence[str] = ("train", "test"),
  data_dir: str | Path | None = None,
  source_files: str | Path | None = None,
) -> dict[str, Images]:
  """Returns splits of a set whose images are read on demand: for ImageNet, or images of many sizes.

  The set is downloaded and prepared the first time; later calls read the copy in `data_dir`, even
  if it was made from other source files. Ids are rows of the full set: those of 'train' come first,
  then 'validation', 'test' and other splits in alphabetical order.

  Args:
    name: name of the set, e.g. 'mnist', 'cifar10', 'imagenet2012', 'emnist/letters'.
    splits: names of the splits to return.
    data_dir: folder of prepared sets; None: TFDS's default.
    source_files: a folder with the files that would be downloaded, for machines that cannot reach
      the site:
      the four IDX files of mnist, fashion_mnist and kmnist (Debian's package dataset-fashion-mnist
      has them), the unpacked binary version of cifar10 and cifar100; and the files of sets that
      TFDS cannot download (imagenet2012), which are then prepared by TFDS.

  Raises:
    ValueError: there is no such set (the error names the nearest) or split, it is not one of images
      with one label each, or the prepared copy has no random access.
    ConnectionError: the download site cannot be reached.
    FileNotFoundError: `source_files` lacks a file.
    ImportError: preparing this set needs TensorFlow; reading it does not.
  """
  builder = _builder(name, data_dir)
  image, label = _features(builder)
  if not builder.is_prepared():
    folder = None if source_files is None else folders.resolve(source_files, "source_files")
    builder = _prepare(builder, folder)
  counts = {split: info.num_examples for split, info in builder.info.splits.items()}
  ranks = {split: rank for rank, split in enumerate(ORDER)}
  order = sorted(counts, key=lambda split: (ranks.get(split, len(ORDER)), split))
  for split in splits:
    if split not in counts:
      raise ValueError(f"splits: expected some of {name}, got {split!r}{suggest(split, order)}")
  starts = dict(zip(order, np.cumsum([0, *(counts[split] for split in order)]).tolist()))
  return {split: _split(builder, split, image, label, starts[split]) for split in splits}


def _split(builder: Any, split: str, image: str, label: str, start: int) -> Images:
  info = builder.info
  try:
    examples = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise ValueError(
      f"data_dir: expected {info.full_name} as array_record, got {info.file_format.value} in "
      f"{builder.data_dir}, which has no random access: choose another data_dir, or {_COPY}"
    ) from error

  def read(ids: Sequence[int]) -> list[tuple[bytes, int]]:
    rows = [int(id) - start for id in ids]
    return [(e[image], int(e[label])) for e in examples.__getitems__(rows)]

  classes = info.features[label]
  return Images(
    read,
    start + np.arange(len(examples)),
    classes.num_classes,
    tuple(classes.names or ()),
    name=info.full_name,
    content=f"{split}, {info.splits[split].num_bytes} bytes",
    channels=1 if info.features[image].shape[-1] == 1 else 3,
  )


def _features(builder: Any) -> tuple[str, str]:
  """Returns the names of the image and of the label."""
  features = builder.info.features
  features = (
    dict(features) if isinstance(features, tfds.features.FeaturesDict) else {"example": features}
  )
  keys: tuple[str, ...] = builder.info.supervised_keys or ()
  kinds = [type(features.get(key)) for key in keys]
  if kinds == [tfds.features.Image, tfds.features.ClassLabel]:
    return keys[0], keys[1]
  content = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
  raise ValueError(
    f"name: expected a set of images with one class label each, got {builder.name} of {content}"
  )


def _builder(name: str, data_dir: str | Path | None) -> Any:
  """Returns TFDS's builder of a set, which may not be prepared yet."""
  try:
    return tfds.builder(name, data_dir=data_dir)
  # TFDS raises it for a text that is no name, and for an unknown name.
  except ValueError as error:
    base = name.partition("/")[0].partition(":")[0]
    names = tfds.list_builders(with_community_datasets=False)
    if base in names:
      raise ValueError(f"name: {error}") from error
    raise ValueError(
      f"name: expected a set of tensorflow_datasets, got {base!r}{_nearest(base, names)}"
    ) from error
  # TFDS raises it for a version that does not exist.
  except AssertionError as error:
    raise ValueError(f"name: {error}") from error
  except ModuleNotFoundError as error:
    raise ImportError(
      f"name: the code of {name!r} in tensorflow_datasets imports {error.name!r}: install it"
    ) from error


def _prepare(builder: Any, source_files: Path | None) -> Any:
  """Prepares the set and returns its builder: the same one, or one that needs no TensorFlow."""
  replacement = without_tensorflow(type(builder), source_files)
  if replacement is not None:
    builder = replacement(data_dir=builder.data_dir_root)
  elif source_files is not None and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    raise ValueError(
      f"source_files: expected None, {builder.name} can only be downloaded: leave source_files "
      f"out, or {_COPY}"
    )
  if source_files is None and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    _check_site(builder)
  config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=source_files)
  try:
    builder.download_and_prepare(download_config=config, file_format="array_record")
  except (requests.RequestException, urllib.error.URLError, DownloadError) as error:
    raise _unreachable(builder, error) from error
  # TFDS raises it where the folder of files that it cannot download is empty.
  except AssertionError as error:
    raise ValueError(
      f"source_files: expected a folder with the files of {builder.name}: {error}"
    ) from error
  except ModuleNotFoundError as error:
    raise ImportError(
      f"preparing {builder.name} needs more than reading it: {error}. Install that here once, or "
      f"{_remedy(builder)}"
    ) from error
  return builder


def _check_site(builder: Any) -> None:
  """Sends one request to the download site: TFDS would try for minutes."""
  for url in list(builder.url_infos or ())[:1]:
    try:
      requests.head(url, timeout=20)
    except requests.RequestException as error:
      raise _unreachable(builder, error) from error


def _unreachable(builder: Any, error: Exception) -> ConnectionError:
  return ConnectionError(
    f"{builder.name} cannot be downloaded from here: {_remedy(builder)}. {error}"
  )


def _remedy(builder: Any) -> str:
  """Returns how to get a set without a download on this machine."""
  if builder.name not in FROM_FILES:
    return _COPY
  return f"give a folder with its source files as source_files=FOLDER, or {_COPY}"


def _nearest(name: str, names: Sequence[str]) -> str:
  """Returns a hint with the nearest names; without one, not all of TFDS's hundreds of names."""
  near = difflib.get_close_matches(name, names, n=3)
  if not near:
    return ": tfds.list_builders() names them all"
  return f": did you mean {' or '.join(map(repr, near))}?"
