"""Makes batches of images or videos that are decoded and cropped while training.

Grain reads ahead with threads (Pillow decodes without Python's lock). The content of a batch
follows from the step number only, so a resumed run sees the same data, whatever the number of
threads.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from distill_jax.data.batches import HostBatch, check_batch_size, permutation
from distill_jax.data.checks import check_seed
from distill_jax.data.crops import Crop, as_entries
from distill_jax.data.videos import Streamed, Videos
from distill_jax.errors import check_integer


@dataclasses.dataclass(frozen=True)
class Stream:
  """A source for `fit`, `start step -> batches`: endless shuffled batches of cropped images.

  The order, the rows left out of an epoch and 'view' are those of `data.batches`. A bad image is
  replaced by the next good one of its epoch.

  Attributes:
    images: the examples, `Images` or `Videos`.
    batch_size: rows per batch.
    crop: function that cuts a view of an example, e.g. `random_resized_crop(224, seed=0)`, of
      videos `clips.random_clip(16, seed=0)`.
    seed: seed of the order, from 0 to 2^32 - 1.
    num_views: number of views per example; 0: every epoch is a new view.
    threads: number of threads that read, decode and crop.
    rows: indices of the rows of each batch to read; None: all.

  Raises:
    ValueError: the batch is larger than the set, a number is out of its range, or a video does not
      fit the crop.
    BadImageError: while iterating, where more images are bad than the set allows.
  """

  images: Streamed
  batch_size: int
  crop: Crop
  seed: int
  num_views: int = 0
  threads: int = 16
  rows: np.ndarray | None = None

  def __post_init__(self):
    check_seed(self.seed)
    for name, least in (("batch_size", 1), ("num_views", 0), ("threads", 1)):
      check_integer(name, getattr(self, name), least)
    check_batch_size(self.batch_size, len(self.images), self.name)
    _check_crop(self)

  @property
  def classes(self) -> int | None:
    """The number of classes; None: the labels are no class numbers."""
    return self.images.classes

  @property
  def name(self) -> str:
    """The name of the set that the ids index."""
    return self.images.name

  @property
  def identity(self) -> str:
    """A value that is equal for the same images of a set, whatever crop, seed and batch size."""
    return f"{self.name}:{self.images.digest}"

  @property
  def steps_per_epoch(self) -> int:
    """The number of full batches of the set."""
    return len(self.images) // self.batch_size

  def __call__(self, start: int) -> Iterator[HostBatch]:
    """Iterates over batches from step `start` on.

    Returns:
      An iterator of 'id' and 'view' int32 [batch], 'image' float32 [batch, size, size, channels],
      or what the crop returns, and 'label' int32 [batch], or the entries that `Images.read`
      returns.
    """
    check_integer("start", start, 0)
    rows = _rows(self)
    positions = grain.MapDataset.range(start * len(rows), sys.maxsize)
    return _batches(positions.map(functools.partial(self._example, rows)), len(rows), self.threads)

  def for_rows(self, rows: np.ndarray) -> "Stream":
    """Returns a stream of some rows of each batch, for one of several processes."""
    return dataclasses.replace(self, rows=rows)

  def _example(self, rows: np.ndarray, position: int) -> dict[str, Any]:
    """Returns one example; `position` counts this process's rows from step 0 on."""
    n = len(self.images)
    step, row = divmod(position, len(rows))
    epoch, step = divmod(step, n // self.batch_size)
    view = epoch % self.num_views if self.num_views else epoch
    order = _order(self.seed, epoch, n)
    index = step * self.batch_size + int(rows[row])
    return _good_example(self.images, self.crop, order, index, view)


@dataclasses.dataclass(frozen=True)
class EvalStream:
  """Batches of every image once, in order, as of `data.eval_batches`, decoded while iterating.

  Bool 'where' [batch_size] is False in the rows that fill up the last batch and in those of bad
  images; 'view' is 0. It can be iterated any number of times.

  Attributes:
    images: the examples, `Images` or `Videos`.
    batch_size: rows per batch.
    crop: function that cuts an image, e.g. `center_crop(224)`, or `clips.uniform_clips(16)`.
    threads: number of threads that read, decode and crop.
    rows: indices of the rows of each batch to read; None: all.

  Raises:
    ValueError: a number is out of its range, or a video does not fit the crop.
    BadImageError: while iterating, where more images are bad than the set allows.
  """

  images: Streamed
  batch_size: int
  crop: Crop
  threads: int = 16
  rows: np.ndarray | None = None

  def __post_init__(self):
    for name in ("batch_size", "threads"):
      check_integer(name, getattr(self, name), 1)
    _check_crop(self)

  def __len__(self) -> int:
    return -(-len(self.images) // self.batch_size)

  @property
  def identity(self) -> str:
    """A value that is equal for the same images of a set."""
    return f"{self.images.name}:{self.images.digest}"

  def __iter__(self) -> Iterator[HostBatch]:
    rows = _rows(self)
    positions = grain.MapDataset.range(0, len(self) * len(rows))
    return _batches(positions.map(functools.partial(self._example, rows)), len(rows), self.threads)

  def for_rows(self, rows: np.ndarray) -> "EvalStream":
    """Returns a stream of some rows of each batch, for one of several processes."""
    return dataclasses.replace(self, rows=rows)

  def _example(self, rows: np.ndarray, position: int) -> dict[str, Any]:
    n = len(self.images)
    step, row = divmod(position, len(rows))
    index = step * self.batch_size + int(rows[row])
    example = _good_example(self.images, self.crop, range(n), min(index, n - 1), 0)
    return example | {"where": np.bool_(index < n and example["id"] == self.images.ids[index])}


def _rows(stream: Stream | EvalStream) -> np.ndarray:
  return np.arange(stream.batch_size) if stream.rows is None else stream.rows


def _check_crop(stream: Stream | EvalStream) -> None:
  if isinstance(stream.images, Videos):
    stream.images.check_crop(stream.crop)


def _batches(examples: grain.MapDataset, batch_size: int, threads: int) -> Iterator[HostBatch]:
  read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * batch_size, threads))
  return iter(examples.to_iter_dataset(read).batch(batch_size))


def _good_example(
  images: Streamed, crop: Crop, order: Sequence[int] | np.ndarray, index: int, view: int
) -> dict[str, Any]:
  """Returns the example at `order[index]` or, if its image is bad, the next good one."""
  # The loop ends, because a set allows only a fraction of its images to be bad.
  while True:
    id = int(images.ids[order[index % len(order)]])
    [(image, labels)] = images.decode([id])
    if image is not None:
      return {
        "id": np.int32(id),
        "view": np.int32(view),
        **labels,
        **as_entries(crop(image, id, view)),
      }
    index += 1


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
  return permutation(seed, epoch, n)
