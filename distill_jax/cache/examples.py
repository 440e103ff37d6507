"""The examples that a teacher is shown: in memory, or images that are read and cropped when they are asked for."""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from distill_jax.cache import identity
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.data.text.tokenized import PackedText

THREADS = 16  # that read, decode and crop
BAD = 0  # source_crc of an image that could not be decoded


class InMemory:
  """The examples of a `Source`.

  Attributes:
    source: where they are.
    shapes: name -> `ShapeDtypeStruct` [N, ...] of their arrays.
  """

  def __init__(self, source: Source):
    self.source, self.shapes = source, identity.shapes(source.arrays)
    self._order = np.argsort(source.ids)
    self._sorted = source.ids[self._order]

  def about(self) -> dict[str, Any]:
    """What tells them from others; the identity's `data`."""
    known = {"vocabulary": self.source.vocabulary} if self.source.vocabulary else {}
    return known | {
      "inputs": identity.inputs(self.shapes),
      "name": self.source.name,
      "examples": identity.digest(self.source.ids, self._checksums),
      "classes": identity.vocabulary(self.source.class_names),
    }

  def batch(self, ids: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these ids (they are known), with their views."""
    places = self.places(ids)
    batch = {name: values.take(places, axis=0) for name, values in self.source.arrays.items()}
    return batch | {"view": np.asarray(views, np.int32)}

  def checksums(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of a batch's inputs before augmentation, uint32 [B]."""
    return self._checksums[self.places(batch["id"])]

  def places(self, ids: np.ndarray) -> np.ndarray:
    """Where the examples of these ids are in the source."""
    return self._order[np.searchsorted(self._sorted, ids)]

  @functools.cached_property
  def _checksums(self) -> np.ndarray:
    return identity.source_checksums(self.source.arrays, identity.inputs(self.shapes))


class Streamed:
  """Crops of encoded `Images`: a view is made anew from the image, the id and the view's number.

  An image that cannot be decoded is shown black, and its rows are marked: nobody reads them, because a `data.Stream`
  leaves it out too.

  Attributes:
    source: where they are.
    crop: `(image, id, view) -> float32 [size, size, channels]`.
    shapes: name -> `ShapeDtypeStruct` [N, ...] of their arrays.
  """

  def __init__(self, images: Images, crop: Crop):
    self.source, self.crop = images, crop
    size = crop(identity.probe_image(images.channels), 0, 0).shape
    kinds = {"id": ((), np.int32), "image": (size, np.float32), "label": ((), np.int32)}
    self.shapes = {
      name: jax.ShapeDtypeStruct((len(images), *shape), dtype)
      for name, (shape, dtype) in kinds.items()
    }

  def about(self) -> dict[str, Any]:
    """What tells them from others; the identity's `data`."""
    images = self.source
    return {
      "inputs": identity.inputs(self.shapes),
      "name": images.name,
      "content": images.content,
      "examples": identity.digest(images.ids, np.zeros(len(images), np.uint32)),
      "classes": identity.vocabulary(images.class_names),
      "crop": identity.cropping(self.crop, images.channels),
    }

  def batch(self, ids: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these ids, with these views of them; black where an image is bad.

    Raises:
      BadImageError: more images are bad than the set allows.
    """
    with ThreadPoolExecutor(THREADS) as pool:
      found = list(pool.map(self._example, np.asarray(ids).tolist(), np.asarray(views).tolist()))
    black = np.zeros(self.shapes["image"].shape[1:], np.float32)
    images = [black if image is None else image for image, _ in found]
    return {
      "id": np.asarray(ids, np.int32),
      "view": np.asarray(views, np.int32),
      "label": np.array([label for _, label in found], np.int32),
      "image": np.stack(images),
    }

  def checksums(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of a batch's inputs before augmentation, uint32 [B]; `BAD` for an image that could not be decoded."""
    good = np.array([int(id) not in self.source.bad for id in batch["id"]])
    return np.where(good, identity.source_checksums(batch, ["image"]), np.uint32(BAD))

  def _example(self, id: int, view: int):
    [(image, label)] = self.source.decoded([id])
    return (None if image is None else self.crop(image, id, view)), label


class Packed:
  """The rows of a text that is read from a file; as a cache sees them, those of the `Source` that `text.load` makes.

  Attributes:
    source: where they are.
    shapes: name -> `ShapeDtypeStruct` [N, ...] of their arrays.
  """

  def __init__(self, text: PackedText):
    self.source, self.shapes = text, text.shapes

  def about(self) -> dict[str, Any]:
    """What tells them from others; the identity's `data`. Reads all of them."""
    text, size = self.source, 4096
    parts = (text.rows(text.ids[first : first + size]) for first in range(0, len(text), size))
    return {
      "vocabulary": text.vocabulary,
      "inputs": identity.inputs(self.shapes),
      "name": text.name,
      "examples": identity.digest(
        text.ids, np.concatenate([self.checksums(part) for part in parts])
      ),
      "classes": identity.vocabulary(text.class_names),
    }

  def batch(self, ids: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these ids (they are known), with their views."""
    return self.source.rows(ids) | {"view": np.asarray(views, np.int32)}

  def checksums(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of a batch's inputs, uint32 [B]."""
    return identity.source_checksums(batch, identity.inputs(self.shapes))


Examples = InMemory | Streamed | Packed


def examples_of(source: Any, crop: Crop | None) -> Examples:
  """The examples of a `Source`, of `Images` and a crop, or of a `PackedText`.

  Raises:
    ValueError: it is neither, or a crop is missing, or not needed.
  """
  if isinstance(source, Source):
    if crop is not None:
      raise ValueError(
        "crop: expected none: the examples are in memory; crop=... cuts data.images.Images"
      )
    return InMemory(source)
  if isinstance(source, Images):
    if crop is None:
      raise ValueError(
        f"crop: the images of {source.name!r} are read while the teacher sees them: give crop=, such as "
        "data.crops.random_resized_crop(224, seed=0), as the student's data.Stream has it"
      )
    return Streamed(source, crop)
  if isinstance(source, PackedText):
    return Packed(source)
  raise ValueError(
    "source: expected a data.Source, data.images.Images or data.tokenized.PackedText, got "
    f"{type(source).__name__}: data.Source(arrays, classes) makes one"
  )
