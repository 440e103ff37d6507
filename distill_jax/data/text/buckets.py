"""Makes batches of texts of similar length, with little padding: one compilation for each length.

train = LengthBuckets(source, 32, seed=0, lengths=(16, 32, 64, 128))
fit(student, teacher, objective, optimizer, train, ...)

pairs = LengthBuckets(source, 32, seed=0, lengths=((16, 16), (32, 48)))  # sources and targets
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.data.batches import HostBatch, check_batch_size, permutation
from distill_jax.data.checks import check_seed, example_name
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.text import frame_rows
from distill_jax.errors import check_integer

Lengths = Sequence[int] | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class LengthBuckets:
  """A source for `fit`, `start step -> batches`: endless shuffled batches, each of one length.

  A batch has the first of `lengths` into which its rows fit. An epoch has every row once, up to
  those that fill no batch; what fills no batch of a length joins the next longer rows. The order
  of rows and batches is a function of (seed, epoch). Cached outputs of a teacher are not cut: give
  all lengths of targets the full length then.

  Attributes:
    source: rows of texts with 'tokens' and 'segments', such as `SentenceTokenizer.rows`; of pairs,
      such as `pair_source`; or of frames or columns, such as `speech_source` and `line_source`.
    batch_size: rows per batch.
    seed: seed of the order, from 0 to 2^32 - 1.
    lengths: numbers of tokens, frames or columns, rising; the last must hold the longest row. For
      pairs, tuples of the lengths of source and target, of which no number falls.
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
  >>> ids = dict(start=8, end=9, source_length=4, target_length=4)
  >>> pairs = data.Source(text.pair_rows([[1], [2, 3, 4]], [[5, 6], [7]], **ids))
  >>> buckets = text.LengthBuckets(pairs, 1, seed=0, lengths=((2, 4), (4, 4)))
  >>> sorted(batch["source"].shape for batch, _ in zip(buckets(0), range(2)))
  [(1, 2), (1, 4)]
  """

  source: Source
  batch_size: int
  seed: int
  lengths: Lengths
  rows: np.ndarray | None = None

  def __post_init__(self):
    check_seed(self.seed)
    check_integer("batch_size", self.batch_size, 1)
    check_batch_size(self.batch_size, len(self.source), self.source.name)
    _ = self._buckets  # raises where a text is too long

  @property
  def classes(self) -> int | None:
    """The source's number of classes."""
    return self.source.classes

  @property
  def ignore_label(self) -> int | None:
    """What marks positions without a label; None if the source has none."""
    return self.source.ignore_label

  @property
  def name(self) -> str:
    """The name of what the ids index."""
    return self.source.name

  @property
  def identity(self) -> str:
    """A value that is equal for the same rows, batched alike."""
    return f"{self.source.digest}:{tuple(x if len(x) > 1 else x[0] for x in self._lengths)}"

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
  def _lengths(self) -> list[tuple[int, ...]]:
    return _checked_lengths(self.lengths)

  @functools.cached_property
  def _buckets(self) -> np.ndarray:
    return _bucket_of_rows(self.source.arrays, self._lengths, self.source.ids)

  def _batches(self, start: int) -> Iterator[HostBatch]:
    epoch, step = divmod(start, self.steps_per_epoch)
    while True:
      for positions in self._order(epoch)[step:]:
        local = positions if self.rows is None else positions[self.rows]
        batch = {name: values[local] for name, values in self.source.arrays.items()}
        length = self._lengths[self._buckets[positions].max()]
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


def cut_padding(batch: HostBatch, lengths: Lengths) -> HostBatch:
  """Returns a batch cut to the first of `lengths` into which its rows fit, as for evaluation.

  Entries of integers or bools of the shape of 'tokens' are cut, and of pairs those of the shape of
  'source' whose names begin with 'source'. Of frames 'features' and the other entries [B, T, ...]
  are cut, and of columns the axis W of 'image'. The others stay.

  Args:
    batch: has 'tokens' [B, L] and 'segments' [B, L], negative for padding; the entries of
      `pair_rows`; 'features' [B, T, F] and 'frames' [B]; or 'image' [B, H, W, C] and 'widths' [B].
    lengths: numbers of tokens, frames or columns, or of pairs tuples of two, as in
      `LengthBuckets`.

  Raises:
    ValueError: a text is longer than the last length, or lengths that do not rise.

  >>> import numpy as np
  >>> from distill_jax.data import text
  >>> segments = np.array([[0, 0, -1, -1, -1, -1]])
  >>> batch = {"tokens": 0 * segments, "segments": segments, "label": np.array([1])}
  >>> {name: x.shape for name, x in text.cut_padding(batch, (4, 6)).items()}
  {'tokens': (1, 4), 'segments': (1, 4), 'label': (1,)}
  """
  numbers = _checked_lengths(lengths)
  bucket = _bucket_of_rows(batch, numbers, batch.get("id")).max()
  return _cut(batch, numbers[bucket])


def _checked_lengths(lengths: Lengths) -> list[tuple[int, ...]]:
  """Returns tuples of one length, that of texts, or of two, those of source and target."""
  if not len(lengths):
    raise ValueError(
      "lengths: expected numbers of tokens such as (16, 32), or for pairs ((16, 16), (32, 48)), "
      "got none"
    )
  numbers = [tuple(x) if isinstance(x, Sequence) else (x,) for x in lengths]
  if {len(x) for x in numbers} not in ({1}, {2}):
    raise ValueError(
      f"lengths: expected numbers, or tuples of two, such as ((16, 16), (32, 48)), got {lengths}"
    )
  for length in (n for pair in numbers for n in pair):
    check_integer("lengths", length, 1)
  for shorter, longer in zip(numbers, numbers[1:]):
    if shorter == longer or any(a > b for a, b in zip(shorter, longer)):
      raise ValueError(f"lengths: expected numbers that rise, got {tuple(lengths)}")
  return numbers


def _bucket_of_rows(arrays, lengths: Sequence[tuple[int, ...]], ids) -> np.ndarray:
  """Returns the index of the first lengths into which each row fits."""
  sizes = frame_rows.sizes(arrays)
  if sizes is not None:
    if len(lengths[0]) > 1:
      raise ValueError(f"lengths: expected numbers of frames or columns, got {tuple(lengths)}")
    return _first_length(sizes, [length for (length,) in lengths], "frames or columns", ids)
  if len(lengths[0]) == 1:
    _check_names(arrays, ("tokens", "segments"), "texts")
    is_token = np.asarray(arrays["segments"]) >= 0
    return _first_fit(is_token, [length for (length,) in lengths], "tokens", ids)
  _check_names(arrays, ("source", "source_segments", "tokens", "label"), "pairs")
  sources, targets = zip(*lengths)
  is_source = np.asarray(arrays["source_segments"]) >= 0
  is_target = np.asarray(arrays["label"]) != UNLABELED
  return np.maximum(
    _first_fit(is_source, sources, "tokens of the source", ids),
    _first_fit(is_target, targets, "tokens of the target", ids),
  )


def _check_names(arrays, names: Sequence[str], kind: str) -> None:
  for name in names:
    if name not in arrays:
      raise ValueError(f"{name}: expected an entry of rows of {kind}, got only {sorted(arrays)}")


def _first_fit(is_token: np.ndarray, lengths: Sequence[int], kind: str, ids) -> np.ndarray:
  """Returns the index of the first length that holds each row up to its last token."""
  sizes = is_token.shape[1] - np.argmax(is_token[:, ::-1], axis=1)
  return _first_length(np.where(is_token.any(1), sizes, 0), lengths, kind, ids)


def _first_length(sizes: np.ndarray, lengths: Sequence[int], kind: str, ids) -> np.ndarray:
  if sizes.max() > lengths[-1]:
    row = int(sizes.argmax())
    raise ValueError(
      f"lengths: expected a last one that holds each row, got {lengths[-1]} for {sizes[row]} "
      f"{kind} of {example_name(ids, row)}"
    )
  return np.searchsorted(lengths, sizes)


def _cut(batch, lengths: tuple[int, ...]) -> HostBatch:
  if frame_rows.sizes(batch) is not None:
    return frame_rows.cut(batch, lengths[0])
  source_length, target_length = lengths[0], lengths[-1]

  def cut(name: str, values: np.ndarray) -> np.ndarray:
    # By name too: sources and targets may be rows of one length.
    is_source = len(lengths) > 1 and name.startswith("source")
    shape = batch["source" if is_source else "tokens"].shape
    is_row = values.shape == shape and values.dtype.kind in "iub"
    return values[:, : source_length if is_source else target_length] if is_row else values

  return {name: cut(name, values) for name, values in batch.items()}
