"""Makes batches of texts of similar length, with little padding: one compilation for each length.

train = LengthBuckets(source, 32, seed=0, lengths=(16, 32, 64, 128))
fit(student, teacher, objective, optimizer, train, ...)
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.data.batches import HostBatch, check_batch_size, permutation
from distill_jax.data.checks import check_seed, example_name
from distill_jax.data.source import Source
from distill_jax.errors import check_integer


@dataclasses.dataclass(frozen=True, eq=False)
class LengthBuckets:
  """A source for `fit`, `start step -> batches`: endless shuffled batches, each of one length.

  A batch has the first of `lengths` into which its rows fit. An epoch has every row once, up to
  those that fill no batch; what fills no batch of a length joins the next longer rows. The order
  of rows and batches is a function of (seed, epoch).

  Attributes:
    source: rows of texts with 'tokens' and 'segments', such as `SentenceTokenizer.rows`.
    batch_size: rows per batch.
    seed: seed of the order, from 0 to 2^32 - 1.
    lengths: numbers of tokens, rising; the last must hold the longest text.
    rows: indices of the rows of each batch to read; None: all.

  Raises:
    ValueError: the batch is larger than the source, a number is out of its range, or a text is
      longer than the last length.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> from distill_jax.data import text
  >>> segments = np.where(np.arange(8) < np.array([[2], [8], [3], [7]]), 0, -1)
  >>> source = data.Source({"tokens": 0 * segments, "segments": segments})
  >>> batches = text.LengthBuckets(source, 2, seed=0, lengths=(4, 8))(0)
  >>> sorted(next(batches)["tokens"].shape for _ in range(2))
  [(2, 4), (2, 8)]
  """

  source: Source
  batch_size: int
  seed: int
  lengths: Sequence[int]
  rows: np.ndarray | None = None

  def __post_init__(self):
    check_seed(self.seed)
    check_integer("batch_size", self.batch_size, 1)
    check_batch_size(self.batch_size, len(self.source), self.source.name)
    _check_lengths(self.lengths)
    _ = self._buckets  # raises where a text is too long

  @property
  def classes(self) -> int | None:
    """The source's number of classes."""
    return self.source.classes

  @property
  def name(self) -> str:
    """The name of what the ids index."""
    return self.source.name

  @property
  def identity(self) -> str:
    """A value that is equal for the same rows, batched alike."""
    return f"{self.source.digest}:{tuple(self.lengths)}"

  @property
  def steps_per_epoch(self) -> int:
    """The number of full batches of the set."""
    return len(self.source) // self.batch_size

  def __call__(self, start: int) -> Iterator[HostBatch]:
    """Iterates over batches from a step on: the source's arrays and 'view', the epoch."""
    check_integer("start", start, 0)
    return self._batches(start)

  def for_rows(self, rows: np.ndarray) -> "LengthBuckets":
    """Returns a source of some rows of each batch, for one of several processes."""
    return dataclasses.replace(self, rows=rows)

  @functools.cached_property
  def _buckets(self) -> np.ndarray:
    return _bucket_of_rows(self.source.arrays, self.lengths, self.source.ids)

  def _batches(self, start: int) -> Iterator[HostBatch]:
    epoch, step = divmod(start, self.steps_per_epoch)
    while True:
      for positions in self._order(epoch)[step:]:
        local = positions if self.rows is None else positions[self.rows]
        batch = {name: values[local] for name, values in self.source.arrays.items()}
        length = self.lengths[self._buckets[positions].max()]
        yield _cut(batch, length) | {"view": np.full(len(local), epoch, np.int32)}
      epoch += 1
      step = 0

  def _order(self, epoch: int) -> np.ndarray:
    """Returns the positions of each batch of an epoch, [steps_per_epoch, batch_size]."""
    steps = self.steps_per_epoch
    # The rows that fill no batch are left out before the sort: they are not always the longest.
    order = permutation(self.seed, epoch, len(self.source))[: steps * self.batch_size]
    # Stable: within a bucket the rows keep their random order.
    order = order[np.argsort(self._buckets[order], kind="stable")]
    return order.reshape(steps, self.batch_size)[permutation(self.seed, epoch, steps)]


def cut_padding(batch: HostBatch, lengths: Sequence[int]) -> HostBatch:
  """Returns a batch cut to the first of `lengths` into which its texts fit, as for evaluation.

  Entries of integers or bools of the shape of 'tokens' are cut; the others stay.

  Args:
    batch: has 'tokens' [B, L] and 'segments' [B, L], negative for padding.
    lengths: numbers of tokens, rising.

  Raises:
    ValueError: a text is longer than the last length, or lengths that do not rise.

  >>> import numpy as np
  >>> from distill_jax.data import text
  >>> segments = np.array([[0, 0, -1, -1, -1, -1]])
  >>> batch = {"tokens": 0 * segments, "segments": segments, "label": np.array([1])}
  >>> {name: x.shape for name, x in text.cut_padding(batch, (4, 6)).items()}
  {'tokens': (1, 4), 'segments': (1, 4), 'label': (1,)}
  """
  _check_lengths(lengths)
  bucket = _bucket_of_rows(batch, lengths, batch.get("id")).max()
  return _cut(batch, lengths[bucket])


def _check_lengths(lengths: Sequence[int]) -> None:
  if not len(lengths):
    raise ValueError("lengths: expected numbers of tokens such as (16, 32, 64), got none")
  for length in lengths:
    check_integer("lengths", length, 1)
  if any(a >= b for a, b in zip(lengths, lengths[1:])):
    raise ValueError(f"lengths: expected numbers that rise, got {tuple(lengths)}")


def _bucket_of_rows(arrays, lengths: Sequence[int], ids) -> np.ndarray:
  """Returns the index of the first length into which each row fits."""
  for name in ("tokens", "segments"):
    if name not in arrays:
      raise ValueError(f"{name}: expected an entry of rows of texts, got only {sorted(arrays)}")
  is_token = np.asarray(arrays["segments"]) >= 0
  sizes = is_token.shape[1] - np.argmax(is_token[:, ::-1], axis=1)
  sizes = np.where(is_token.any(1), sizes, 0)
  if sizes.max() > lengths[-1]:
    row = int(sizes.argmax())
    raise ValueError(
      f"lengths: expected a last one that holds each text, got {lengths[-1]} for {sizes[row]} "
      f"tokens of {example_name(ids, row)}"
    )
  return np.searchsorted(lengths, sizes)


def _cut(batch, length: int) -> HostBatch:
  shape = batch["tokens"].shape

  def cut(values):
    is_row = values.shape == shape and values.dtype.kind in "iub"
    return values[:, :length] if is_row else values

  return {name: cut(values) for name, values in batch.items()}
