"""Makes batches that follow from the step number, so that a resumed run sees the same data."""

import itertools
from collections.abc import Iterator

import numpy as np

from distill_jax.data.balance import balanced_order, check_balance
from distill_jax.data.checks import check_seed
from distill_jax.data.source import Source
from distill_jax.errors import check_integer

HostBatch = dict[str, np.ndarray]


def batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  start: int = 0,
  num_views: int = 0,
  balance: str | None = None,
  rows: np.ndarray | None = None,
) -> Iterator[HostBatch]:
  """Iterates over endless shuffled training batches, all of one size.

  Batch number `step` is a function of (source, batch_size, seed, num_views, balance, step): an
  iterator that starts at step s continues as an uninterrupted one. Each epoch is a permutation by
  (seed, epoch); the rows that do not fill a batch are left out of it.

  Args:
    source: the examples.
    batch_size: rows per batch.
    seed: from 0 to 2^32 - 1.
    start: the first step.
    num_views: number of augmented views per example: 'view' is the epoch modulo `num_views`. 0:
      every epoch is a new view.
    balance: the entry of class numbers [N], e.g. 'label', all of which are equally frequent in an
      epoch, up to one row: rows of rare classes come several times, as other views, and those of
      frequent ones not in each epoch. None: each row comes once.
    rows: indices of the rows of each batch to return, for processes that divide a batch
      (`sharding.local_rows`); None: all.

  Returns:
    An iterator of the source's arrays [batch_size, ...] and 'view' int32 [batch_size].

  Raises:
    ValueError: the batch is larger than the source, or an argument is out of its range: now, not at
      the first batch.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> arrays = {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}
  >>> source = data.Source(arrays, classes=2)
  >>> batch = next(data.batches(source, 4, seed=0))
  >>> batch["image"].shape, sorted(batch)
  ((4, 4, 4, 1), ['id', 'image', 'label', 'view'])
  """
  check_seed(seed)
  check_integer("batch_size", batch_size, 1)
  check_integer("start", start, 0)
  check_integer("num_views", num_views, 0)
  check_batch_size(batch_size, len(source), source.name)
  rows = np.arange(batch_size) if rows is None else rows
  classes = None if balance is None else check_balance(source, balance)
  return _batches(source, batch_size, seed, start, num_views, classes, rows)


def eval_batches(
  source: Source, batch_size: int, *, rows: np.ndarray | None = None
) -> Iterator[HostBatch]:
  """Iterates over every example once, in order, in batches of one size.

  Args:
    source: the examples.
    batch_size: rows per batch. The last batch is filled up by repeating the source's last row.
    rows: as in `batches`.

  Returns:
    An iterator of the source's arrays [batch_size, ...], 'view' int32 [batch_size] of zeros, and
    'where' bool [batch_size], False in the rows that fill up the last batch.

  Raises:
    ValueError: `batch_size` is not an integer >= 1.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> arrays = {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}
  >>> source = data.Source(arrays, classes=2)
  >>> [batch["where"].sum().item() for batch in data.eval_batches(source, 4)]
  [4, 4, 2]
  """
  check_integer("batch_size", batch_size, 1)
  return _eval_batches(source, batch_size, np.arange(batch_size) if rows is None else rows)


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  """Returns the order of an epoch, int64 [size]."""
  return _generator(seed, epoch).permutation(size)


def check_batch_size(batch_size: int, size: int, name: str) -> None:
  """Raises a ValueError if a batch is larger than the set of `size` examples called `name`."""
  if batch_size > size:
    raise ValueError(
      f"batch_size: expected at most the {size} examples of {name}, got {batch_size}"
    )


def _generator(seed: int, epoch: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))))


def _batches(
  source: Source,
  batch_size: int,
  seed: int,
  start: int,
  num_views: int,
  classes: np.ndarray | None,
  rows: np.ndarray,
) -> Iterator[HostBatch]:
  size = len(source)
  steps_per_epoch = size // batch_size
  order, views, epoch = None, None, None
  for step in itertools.count(start):
    if order is None or views is None or step // steps_per_epoch != epoch:
      epoch = step // steps_per_epoch
      if classes is None:
        order, views = permutation(seed, epoch, size), np.full(size, epoch)
      else:
        order, views = balanced_order(classes, _generator(seed, epoch), epoch)
    first = step % steps_per_epoch * batch_size
    positions = np.arange(first, first + batch_size)[rows]
    view = views[positions] % num_views if num_views else views[positions]
    yield _gather(source, order[positions], view)


def _eval_batches(source: Source, batch_size: int, rows: np.ndarray) -> Iterator[HostBatch]:
  for first in range(0, len(source), batch_size):
    positions = np.arange(first, first + batch_size)[rows]
    views = np.zeros(len(positions), np.int32)
    batch = _gather(source, np.minimum(positions, len(source) - 1), views)
    yield batch | {"where": positions < len(source)}


def _gather(source: Source, positions: np.ndarray, views: np.ndarray) -> HostBatch:
  batch = {name: values.take(positions, axis=0) for name, values in source.arrays.items()}
  return batch | {"view": views.astype(np.int32)}
