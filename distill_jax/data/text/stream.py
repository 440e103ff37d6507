"""Batches of packed rows that are read while training: for text beyond memory."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator

import grain
import numpy as np

from distill_jax.data.batches import HostBatch, check_whole, permutation
from distill_jax.data.checks import check_seed
from distill_jax.data.text.tokenized import PackedText


@dataclasses.dataclass(frozen=True)
class TextStream:
  """Endless shuffled training batches: a function `start step -> iterator of batches`, the source of `fit`.

  The batches are those of `data.batches` of the same rows in memory, at any step. Grain reads ahead with threads. 12
  bytes a row are held: ids and the epoch's order.

  Attributes:
    text: the rows.
    batch_size: rows per batch.
    seed: of the order, from 0 to 2^32 - 1.
    threads: that read.
    rows: those of each batch that are read here; None: all.

  Raises:
    ValueError: the batch is larger than the text, or a number is out of its range.
  """

  text: PackedText
  batch_size: int
  seed: int
  threads: int = 4
  rows: np.ndarray | None = None

  def __post_init__(self):
    check_seed(self.seed)
    for name in ("batch_size", "threads"):
      check_whole(name, getattr(self, name), 1)
    if self.batch_size > len(self.text):
      raise ValueError(
        f"batch_size {self.batch_size} is more than the {len(self.text)} rows of {self.name}: at most {len(self.text)}"
      )

  @property
  def classes(self) -> int:
    return self.text.classes

  @property
  def name(self) -> str:
    return self.text.name

  @property
  def identity(self) -> str:
    """Equal for the same rows of the same text."""
    text = self.text
    ids = hashlib.blake2b(text.ids.tobytes(), digest_size=8).hexdigest()
    return f"{text.name}:{text.vocabulary}:{text.about['files']}:{text.length}:{ids}"

  def __call__(self, start: int) -> Iterator[HostBatch]:
    """Batches from step `start` on: the arrays of `text.pack`, 'id' and 'view', int32."""
    check_whole("start", start, 0)
    batches = grain.MapDataset.range(start, sys.maxsize).map(self._batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(self.threads, 2 * self.threads)))

  def for_rows(self, rows: np.ndarray) -> "TextStream":
    """The same batches, of which this process reads some rows only (`sharding.local_rows`)."""
    return dataclasses.replace(self, rows=rows)

  def _batch(self, step: int) -> HostBatch:
    epoch, step = divmod(int(step), len(self.text) // self.batch_size)
    first = step * self.batch_size
    places = _order(self.seed, epoch, len(self.text))[first : first + self.batch_size]
    places = places if self.rows is None else places[self.rows]
    return self.text.rows(self.text.ids[places]) | {"view": np.full(len(places), epoch, np.int32)}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
  return permutation(seed, epoch, n)
