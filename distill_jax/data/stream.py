"""Batches of images that are decoded and cropped while training: for sets of many sizes, or beyond memory.

Grain reads ahead with threads (Pillow decodes without Python's lock). What a batch holds follows from the step
number alone, so a resumed run sees what it would have seen, whatever the number of threads.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from distill_jax.data.batches import HostBatch, check_whole, permutation
from distill_jax.data.checks import check_seed
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images


@dataclasses.dataclass(frozen=True)
class Stream:
  """Endless shuffled training batches: a function `start step -> iterator of batches`, the source of `fit`.

  The order, the rows left out of an epoch and 'view' are those of `data.batches`. An image that cannot be
  decoded is replaced by the next one of its epoch that can.

  Attributes:
    images: the examples.
    batch_size: rows per batch.
    crop: the view of an example, e.g. `random_resized_crop(224, seed=0)`.
    seed: of the order, from 0 to 2^32 - 1.
    num_views: number of different views an example has; 0 makes a new one each epoch.
    threads: that read, decode and crop.
    rows: those of each batch that are read here; None: all.

  Raises:
    ValueError: the batch is larger than the set, or a number is out of its range.
    BadImageError: while iterating, when more images are bad than the set allows.
  """

  images: Images
  batch_size: int
  crop: Crop
  seed: int
  num_views: int = 0
  threads: int = 16
  rows: np.ndarray | None = None

  def __post_init__(self):
    check_seed(self.seed)
    for name, least in (("batch_size", 1), ("num_views", 0), ("threads", 1)):
      check_whole(name, getattr(self, name), least)
    if self.batch_size > len(self.images):
      raise ValueError(
        f"batch_size {self.batch_size} is more than the {len(self.images)} images of {self.name}: "
        f"at most {len(self.images)}"
      )

  @property
  def classes(self) -> int:
    return self.images.classes

  @property
  def name(self) -> str:
    return self.images.name

  @property
  def identity(self) -> str:
    """Equal for the same images in the same set; not the crop's, the seed's or the batch's."""
    ids = hashlib.blake2b(self.images.ids.tobytes(), digest_size=8).hexdigest()
    return f"{self.name}:{self.images.content}:{ids}"

  def __call__(self, start: int) -> Iterator[HostBatch]:
    """Batches from step `start` on: 'id', 'view', 'label' int32 [batch], 'image' float32 [batch, size, size,
    channels]."""
    check_whole("start", start, 0)
    rows = _rows(self)
    places = grain.MapDataset.range(start * len(rows), sys.maxsize)
    return _batches(places.map(functools.partial(self._example, rows)), len(rows), self.threads)

  def for_rows(self, rows: np.ndarray) -> "Stream":
    """The same batches, of which this process reads some rows only (`sharding.local_rows`)."""
    return dataclasses.replace(self, rows=rows)

  def _example(self, rows: np.ndarray, place: int) -> dict[str, Any]:
    n = len(self.images)
    step, own = divmod(place, len(rows))
    row = int(rows[own])
    epoch, step = divmod(step, n // self.batch_size)
    view = epoch % self.num_views if self.num_views else epoch
    order = _order(self.seed, epoch, n)
    return _example(self.images, self.crop, order, step * self.batch_size + row, view)


@dataclasses.dataclass(frozen=True)
class EvalStream:
  """Every image once, in order, in batches of one size: as `data.eval_batches`, decoded on the way.

  Bool 'where' [batch_size] is False in the rows that fill up the last batch and in those of images that
  cannot be decoded; 'view' is 0. It can be iterated any number of times.

  Attributes:
    images, batch_size, threads, rows: as in `Stream`.
    crop: e.g. `center_crop(224)`.

  Raises:
    ValueError: a number is out of its range.
    BadImageError: while iterating, when more images are bad than the set allows.
  """

  images: Images
  batch_size: int
  crop: Crop
  threads: int = 16
  rows: np.ndarray | None = None

  def __post_init__(self):
    for name in ("batch_size", "threads"):
      check_whole(name, getattr(self, name), 1)

  def __len__(self) -> int:
    return -(-len(self.images) // self.batch_size)

  def __iter__(self) -> Iterator[HostBatch]:
    rows = _rows(self)
    places = grain.MapDataset.range(0, len(self) * len(rows))
    return _batches(places.map(functools.partial(self._example, rows)), len(rows), self.threads)

  def for_rows(self, rows: np.ndarray) -> "EvalStream":
    """As in `Stream`."""
    return dataclasses.replace(self, rows=rows)

  def _example(self, rows: np.ndarray, place: int) -> dict[str, Any]:
    n = len(self.images)
    step, own = divmod(place, len(rows))
    place = step * self.batch_size + int(rows[own])
    example = _example(self.images, self.crop, range(n), min(place, n - 1), 0)
    return example | {"where": np.bool_(place < n and example["id"] == self.images.ids[place])}


def _rows(stream: Stream | EvalStream) -> np.ndarray:
  return np.arange(stream.batch_size) if stream.rows is None else stream.rows


def _batches(examples: grain.MapDataset, batch_size: int, threads: int) -> Iterator[HostBatch]:
  read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * batch_size, threads))
  return iter(examples.to_iter_dataset(read).batch(batch_size))


def _example(
  images: Images, crop: Crop, rows: Sequence[int] | np.ndarray, place: int, view: int
) -> dict[str, Any]:
  """The example at a place among `rows`; where it is bad, the next one that is not."""
  while True:  # ends, because a set allows only a share of its images to be bad
    id = int(images.ids[rows[place % len(rows)]])
    [(image, label)] = images.decoded([id])
    if image is not None:
      return {
        "id": np.int32(id),
        "view": np.int32(view),
        "label": np.int32(label),
        "image": crop(image, id, view),
      }
    place += 1


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
  return permutation(seed, epoch, n)
