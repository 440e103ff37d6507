"""Makes batches of packed rows that are read while training: for text beyond memory."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator

import grain
import numpy as np

from distill_jax.data.batches import HostBatch, check_batch_size, permutation
from distill_jax.data.checks import check_seed
from distill_jax.data.text.tokenized import PackedText
from distill_jax.errors import check_integer


@dataclasses.dataclass(frozen=True)
class TextStream:
  """A source for `fit`, `start step -> batches`: endless shuffled batches of packed text.

  The batches are those of `data.batches` of the same rows in memory, at any step. Grain reads ahead
  with threads. Ids and the epoch's order take 12 bytes of memory a row.

  Attributes:
    text: the rows.
    batch_size: rows per batch.
    seed: seed of the order, from 0 to 2^32 - 1.
    threads: number of threads that read.
    rows: indices of the rows of each batch to read; None: all.

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
      check_integer(name, getattr(self, name), 1)
    check_batch_size(self.batch_size, len(self.text), self.name)

  @property
  def classes(self) -> int:
    """The number of tokens in the vocabulary."""
    return self.text.classes

  @property
  def name(self) -> str:
    """The name of the text that the ids index."""
    return self.text.name

  @property
  def identity(self) -> str:
    """A value that is equal for the same rows of the same text."""
    text = self.text
    ids = hashlib.blake2b(text.ids.tobytes(), digest_size=8).hexdigest()
    return f"{text.name}:{text.vocabulary}:{text.index['files']}:{text.length}:{ids}"

  @property
  def steps_per_epoch(self) -> int:
    """The number of full batches of the set."""
    return len(self.text) // self.batch_size

  def __call__(self, start: int) -> Iterator[HostBatch]:
    """Iterates over batches from a step on: the arrays of `text.pack`, 'id' and 'view', int32."""
    check_integer("start", start, 0)
    batches = grain.MapDataset.range(start, sys.maxsize).map(self._batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(self.threads, 2 * self.threads)))

  def for_rows(self, rows: np.ndarray) -> "TextStream":
    """Returns a stream of some rows of each batch, for one of several processes."""
    return dataclasses.replace(self, rows=rows)

  def _batch(self, step: int) -> HostBatch:
    epoch, step = divmod(int(step), len(self.text) // self.batch_size)
    first = step * self.batch_size
    indices = _order(self.seed, epoch, len(self.text))[first : first + self.batch_size]
    indices = indices if self.rows is None else indices[self.rows]
    batch = self.text.rows(self.text.ids[indices])
    return batch | {"view": np.full(len(indices), epoch, np.int32)}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
  return permutation(seed, epoch, n)
