"""Builds a teacher's input batches from arrays, from images that are cropped on demand, or text."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from distill_jax.cache import identity
from distill_jax.cache.probes import probe_of
from distill_jax.data import Source
from distill_jax.data.crops import Crop, as_entries
from distill_jax.data.text.tokenized import PackedText
from distill_jax.data.videos import Streamed

THREADS = 16  # that read, decode and crop
TEXT_ROWS = 4096  # read at once
UNDECODABLE = 0  # source_crc of an image that cannot be decoded


class ArrayInputs:
  """The examples of a `Source`.

  Attributes:
    source: the `Source`.
    shapes: name -> `ShapeDtypeStruct` [N, ...] of its arrays.
  """

  def __init__(self, source: Source):
    self.source = source
    self.shapes = identity.array_shapes(source.arrays)
    self._order = np.argsort(source.ids)
    self._sorted_ids = source.ids[self._order]
    self._checksums: dict[str, np.ndarray] = {}

  def identity(self, names: Sequence[str]) -> dict[str, Any]:
    """Returns the `data` part of a cache's identity, of the inputs of these names."""
    source = self.source
    tokenizer = {"vocabulary": source.vocabulary} if source.vocabulary else {}
    return tokenizer | {
      "inputs": identity.input_specs(self.shapes, names),
      "name": source.name,
      "examples": identity.examples_digests(source.ids, self._entry_checksums(names)),
      "classes": identity.vocabulary(source.class_names),
    }

  def batch(self, ids: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples of these ids [B], all of the source, with their views [B]."""
    positions = self.positions(ids)
    batch = {name: values.take(positions, axis=0) for name, values in self.source.arrays.items()}
    return batch | {"view": np.asarray(views, np.int32)}

  def checksums(self, batch: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Returns checksums of a batch's inputs of these names before augmentation, uint32 [B]."""
    positions = self.positions(batch["id"])
    checksums = {name: x[positions] for name, x in self._entry_checksums(names).items()}
    return identity.join_checksums(checksums, len(positions))

  def positions(self, ids: np.ndarray) -> np.ndarray:
    """Returns the positions of these ids in the source."""
    return self._order[np.searchsorted(self._sorted_ids, ids)]

  def _entry_checksums(self, names: Sequence[str]) -> dict[str, np.ndarray]:
    for name in set(names) - set(self._checksums):
      self._checksums[name] = identity.entry_checksums(self.source.arrays[name])
    return {name: self._checksums[name] for name in names}


class ImageInputs:
  """Crops of `Images` or `Videos`: a view is computed from the image, its id and the view's number.

  An image that cannot be decoded is black, and its rows are marked: no run reads them, because a
  `data.stream.Stream` leaves the image out as well.

  Attributes:
    source: the `Images` or `Videos`.
    crop: `(image, id, view) -> float32 [size, size, channels]`, or several entries.
    shapes: name -> `ShapeDtypeStruct` [N, ...] of the arrays of all examples,
      without labels.
  """

  def __init__(self, images: Streamed, crop: Crop):
    self.source = images
    self.crop = crop
    # A teacher does not read labels, whose entries are known once an image is read.
    self._blank = jax.tree.map(np.zeros_like, as_entries(crop(probe_of(images), 0, 0)))
    row = {"id": np.int32(0), **self._blank}
    self.shapes = {
      name: jax.ShapeDtypeStruct((len(images), *x.shape), x.dtype) for name, x in row.items()
    }

  def identity(self, names: Sequence[str]) -> dict[str, Any]:
    """Returns the `data` part of a cache's identity, of the inputs of these names."""
    images = self.source
    return {
      "inputs": identity.input_specs(self.shapes, names),
      "name": images.name,
      "content": images.content,
      "examples": identity.examples_digests(images.ids, {}),
      "classes": identity.vocabulary(images.class_names),
      "crop": identity.crop_identity(self.crop, images),
    }

  def batch(self, ids: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """Returns these views [B] of the examples of these ids [B]; undecodable images are black.

    Raises:
      BadImageError: more images are undecodable than the set allows.
    """
    ids = np.asarray(ids, np.int32)
    views = np.asarray(views, np.int32)
    with ThreadPoolExecutor(THREADS) as pool:
      examples = list(pool.map(self._example, ids.tolist(), views.tolist()))
    return {"id": ids, "view": views} | {
      name: np.stack([example[name] for example in examples]) for name in examples[0]
    }

  def checksums(self, batch: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Returns checksums of a batch's inputs, uint32 [B]; `UNDECODABLE` for such an image."""
    is_decodable = np.array([int(id) not in self.source.bad for id in batch["id"]])
    checksums = identity.input_checksums(batch, names)
    return np.where(is_decodable, checksums, np.uint32(UNDECODABLE))

  def _example(self, id: int, view: int) -> dict[str, np.ndarray]:
    [(image, labels)] = self.source.decode([id])
    return labels | (self._blank if image is None else as_entries(self.crop(image, id, view)))


class TextInputs:
  """The rows of a text in a file; a cache of them equals one of the `Source` of `text.load`.

  Attributes:
    source: the `PackedText`.
    shapes: name -> `ShapeDtypeStruct` [N, ...] of the arrays of all rows.
  """

  def __init__(self, text: PackedText):
    self.source = text
    self.shapes = text.shapes

  def identity(self, names: Sequence[str]) -> dict[str, Any]:
    """Returns the `data` part of a cache's identity, of the inputs of these names.

    It reads all rows.
    """
    text = self.source
    firsts = range(0, len(text), TEXT_ROWS)
    parts = (text.rows(text.ids[first : first + TEXT_ROWS]) for first in firsts)
    checksums: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for part in parts:
      for name in names:
        checksums[name].append(identity.entry_checksums(part[name]))
    return {
      "vocabulary": text.vocabulary,
      "inputs": identity.input_specs(self.shapes, names),
      "name": text.name,
      "examples": identity.examples_digests(
        text.ids, {name: np.concatenate(values) for name, values in checksums.items()}
      ),
      "classes": identity.vocabulary(text.class_names),
    }

  def batch(self, ids: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples of these ids [B], all of the source, with their views [B]."""
    return self.source.rows(ids) | {"view": np.asarray(views, np.int32)}

  def checksums(self, batch: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Returns checksums of a batch's inputs of these names, uint32 [B]."""
    return identity.input_checksums(batch, names)


TeacherInputs = ArrayInputs | ImageInputs | TextInputs


def make_teacher_inputs(source: Any, crop: Crop | None) -> TeacherInputs:
  """Returns the inputs of arrays, a `Source`, `Images` or `Videos` and a crop, or a `PackedText`.

  Raises:
    ValueError: another source, or a crop that is missing or not needed.
  """
  if isinstance(source, Mapping):
    source = Source(source)
  if isinstance(source, Source):
    if crop is not None:
      raise ValueError(
        "crop: expected None for a data.Source, got a crop, which is for data.images.Images: leave "
        "it out"
      )
    return ArrayInputs(source)
  if isinstance(source, Streamed):
    if crop is None:
      raise ValueError(
        f"crop: expected a crop of the images of {source.name!r}, got None: pass the one of the "
        "student's data.stream.Stream, such as data.crops.random_resized_crop(224, seed=0), or of "
        "videos data.clips.random_clip(16, seed=0)"
      )
    return ImageInputs(source, crop)
  if isinstance(source, PackedText):
    return TextInputs(source)
  raise ValueError(
    "source: expected a dict of arrays, a data.Source, data.images.Images, data.videos.Videos or a "
    f"data.text.tokenized.PackedText, got {type(source).__name__}: of batches write "
    'source = data.from_iterable(batches, keys=("image", "label")).load(), and train on the same'
  )
