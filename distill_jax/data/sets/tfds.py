"""Image classification sets by their name in TensorFlow Datasets, read from ArrayRecord without TensorFlow."""

import difflib
import urllib.error
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from distill_jax.data.images import Images
from distill_jax.data.sets.builders import FROM_FILES, without_tensorflow
from distill_jax.data.source import Source
from distill_jax.errors import suggest

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
  """Splits of a set in memory, as float32 images in 0..1: see `images` for arguments and errors.

  Args:
    size: for images of many sizes: each one's central square is resized to this side.

  Raises:
    ValueError: also where images differ in size and none is given, or do not fit in memory.
  """
  found = images(name, splits=splits, data_dir=data_dir, source_files=source_files)
  return {split: part.load(size) for split, part in found.items()}


def images(
  name: str,
  *,
  splits: Sequence[str] = ("train", "test"),
  data_dir: str | Path | None = None,
  source_files: str | Path | None = None,
) -> dict[str, Images]:
  """Splits of a set, read when they are needed: for ImageNet, or images of many sizes.

  The set is downloaded and prepared the first time; a copy prepared in `data_dir` is used from then on, even
  if it was made from other source files. Ids are rows of the whole set: those of 'train' come first, then
  'validation', 'test' and other splits in alphabetical order.

  Args:
    name: e.g. 'mnist', 'fashion_mnist', 'cifar10', 'cifar100', 'imagenet2012', 'emnist/letters'.
    splits: which ones to return, under these names.
    data_dir: where prepared sets are; None: TFDS's own place.
    source_files: a folder with the files that would be downloaded, for machines that cannot reach the site:
      the four IDX files of mnist, fashion_mnist and kmnist (Debian's package dataset-fashion-mnist has them),
      the unpacked binary version of cifar10 and cifar100; and the files of sets that TFDS cannot download
      (imagenet2012), which are then prepared by TFDS.

  Raises:
    ValueError: there is no such set (the nearest name is given) or split, it is not one of images with one
      label each, or what is prepared there cannot be read at random.
    ConnectionError: the download site cannot be reached.
    FileNotFoundError: `source_files` lacks a file.
    ImportError: preparing this set needs TensorFlow; reading it does not.
  """
  builder = _builder(name, data_dir)
  image, label = _features(builder)
  if not builder.is_prepared():
    builder = _prepared(builder, None if source_files is None else Path(source_files))
  counts = {split: info.num_examples for split, info in builder.info.splits.items()}
  order = sorted(
    counts, key=lambda split: (ORDER.index(split) if split in ORDER else len(ORDER), split)
  )
  for split in splits:
    if split not in counts:
      raise ValueError(f"{name} has no split {split!r}{suggest(split, order)}")
  starts = dict(zip(order, np.cumsum([0, *(counts[split] for split in order)]).tolist()))
  return {split: _split(builder, split, image, label, starts[split]) for split in splits}


def _split(builder, split: str, image: str, label: str, start: int) -> Images:
  info = builder.info
  try:
    examples = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise ValueError(
      f"{info.full_name} in {builder.data_dir} is prepared as {info.file_format.value}, which has no random access: "
      f"choose another data_dir, or {_COPY}"
    ) from error

  def read(ids: Sequence[int]) -> list[tuple[bytes, int]]:
    return [
      (e[image], int(e[label])) for e in examples.__getitems__([int(id) - start for id in ids])
    ]

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


def _features(builder) -> tuple[str, str]:
  """The names of the image and of the label."""
  features = builder.info.features
  features = (
    dict(features) if isinstance(features, tfds.features.FeaturesDict) else {"example": features}
  )
  keys: tuple[str, ...] = builder.info.supervised_keys or ()
  kinds = [type(features.get(key)) for key in keys]
  if kinds == [tfds.features.Image, tfds.features.ClassLabel]:
    return keys[0], keys[1]
  has = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
  raise ValueError(f"{builder.name} is not a set of images with one class label each: it has {has}")


def _builder(name: str, data_dir):
  """TFDS's builder, which may not be prepared yet."""
  try:
    return tfds.builder(name, data_dir=data_dir)
  except ValueError as error:  # not a name, or of no set
    base, known = (
      name.partition("/")[0].partition(":")[0],
      tfds.list_builders(with_community_datasets=False),
    )
    if base in known:
      raise
    raise ValueError(f"tensorflow_datasets has no set {base!r}{_near(base, known)}") from error
  except AssertionError as error:  # of a version that does not exist
    raise ValueError(str(error)) from error
  except ModuleNotFoundError as error:
    raise ImportError(
      f"tensorflow_datasets' code of {name!r} needs {error.name!r} even to be read"
    ) from error


def _prepared(builder, source_files: Path | None):
  """The same builder, or one that needs no TensorFlow, after it has prepared the set."""
  changed = without_tensorflow(type(builder), source_files)
  if changed is not None:
    builder = changed(data_dir=builder.data_dir_root)
  elif source_files is not None and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    raise ValueError(
      f"source_files: {builder.name} can only be downloaded: leave source_files out, or {_COPY}"
    )
  if source_files is None and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    _check_site(builder)
  config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=source_files)
  try:
    builder.download_and_prepare(download_config=config, file_format="array_record")
  except (requests.RequestException, urllib.error.URLError, DownloadError) as error:
    raise _unreachable(builder, error) from error
  except AssertionError as error:  # the folder of files that TFDS cannot download is empty
    raise ValueError(f"{builder.name}: give the files' folder as source_files. {error}") from error
  except ModuleNotFoundError as error:
    raise ImportError(
      f"preparing {builder.name} needs more than reading it: {error}. Install that here once, or {_instead(builder)}"
    ) from error
  return builder


def _check_site(builder) -> None:
  """One request before TFDS, which tries for minutes."""
  for url in list(builder.url_infos or ())[:1]:
    try:
      requests.head(url, timeout=20)
    except requests.RequestException as error:
      raise _unreachable(builder, error) from error


def _unreachable(builder, error: Exception) -> ConnectionError:
  return ConnectionError(
    f"{builder.name} cannot be downloaded from here: {_instead(builder)}. {error}"
  )


def _instead(builder) -> str:
  give = (
    "give a folder with its source files as source_files=FOLDER, or "
    if builder.name in FROM_FILES
    else ""
  )
  return give + _COPY


def _near(name: str, known: Sequence[str]) -> str:
  """Without TFDS's hundreds of names where none is near."""
  near = difflib.get_close_matches(name, known, n=3)
  return (
    f"; did you mean {' or '.join(map(repr, near))}?"
    if near
    else "; tfds.list_builders() names them all"
  )
