"""Makes batches that follow from the step number, so that a resumed run sees the same data."""

import itertools
from collections.abc import Iterator

import numpy as np

from distill_jax.data.checks import check_integer, check_seed
from distill_jax.data.source import Source

HostBatch = dict[str, np.ndarray]


def batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  start: int = 0,
  num_views: int = 0,
  rows: np.ndarray | None = None,
) -> Iterator[HostBatch]:
  """Iterates over endless shuffled training batches, all of one size.

  Batch number `step` is a function of (source, batch_size, seed, num_views, step): an iterator that
  starts at step s continues as an uninterrupted one. Each epoch is a permutation by (seed, epoch);
  the rows that do not fill a batch are left out of it.

  Args:
    source: the examples.
    batch_size: rows per batch.
    seed: from 0 to 2^32 - 1.
    start: the first step.
    num_views: number of augmented views per example: 'view' is the epoch modulo `num_views`. 0:
      every epoch is a new view.
    rows: indices of the rows of each batch to return, for processes that divide a batch
      (`sharding.local_rows`); None: all.

  Returns:
    An iterator of the source's arrays [batch_size, ...] and 'view' int32 [batch_size].

  Raises:
    ValueError: the batch is larger than the source, or an argument is out of its range: now, not at
      the first batch.
  """
  check_seed(seed)
  check_integer("batch_size", batch_size, 1)
  check_integer("start", start, 0)
  check_integer("num_views", num_views, 0)
  check_batch_size(batch_size, len(source), source.name)
  rows = np.arange(batch_size) if rows is None else rows
  return _batches(source, batch_size, seed, start, num_views, rows)


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
  """
  check_integer("batch_size", batch_size, 1)
  return _eval_batches(source, batch_size, np.arange(batch_size) if rows is None else rows)


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  """Returns the order of an epoch, int64 [size]."""
  sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
  return np.random.Generator(np.random.Philox(sequence)).permutation(size)


def check_batch_size(batch_size: int, size: int, name: str) -> None:
  """Raises a ValueError if a batch is larger than the set of `size` examples called `name`."""
  if batch_size > size:
    raise ValueError(
      f"batch_size: expected at most the {size} examples of {name}, got {batch_size}"
    )


def _batches(
  source: Source, batch_size: int, seed: int, start: int, num_views: int, rows: np.ndarray
) -> Iterator[HostBatch]:
  steps_per_epoch = len(source) // batch_size
  order, epoch = None, None
  for step in itertools.count(start):
    if order is None or step // steps_per_epoch != epoch:
      epoch = step // steps_per_epoch
      order = permutation(seed, epoch, len(source))
    first = step % steps_per_epoch * batch_size
    view = epoch % num_views if num_views else epoch
    yield _gather(source, order[first : first + batch_size][rows], view)


def _eval_batches(source: Source, batch_size: int, rows: np.ndarray) -> Iterator[HostBatch]:
  for first in range(0, len(source), batch_size):
    positions = np.arange(first, first + batch_size)[rows]
    batch = _gather(source, np.minimum(positions, len(source) - 1), 0)
    yield batch | {"where": positions < len(source)}


def _gather(source: Source, positions: np.ndarray, view: int) -> HostBatch:
  batch = {name: values.take(positions, axis=0) for name, values in source.arrays.items()}
  return batch | {"view": np.full(len(positions), view, np.int32)}
