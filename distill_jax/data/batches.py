"""Batches whose content follows from the step number, so that a resumed run sees what it would have seen."""

import itertools
from collections.abc import Iterator

import numpy as np

from distill_jax.data.checks import check_seed
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
  """Endless shuffled training batches, all of one size.

  Batch number `step` is a function of (source, batch_size, seed, num_views, step): starting at step s gives
  exactly what an undisturbed iterator gives from there. Each epoch is a permutation by (seed, epoch); the
  rows that do not fill a batch are left out of it.

  Args:
    source: the examples.
    batch_size: rows per batch.
    seed: from 0 to 2^32 - 1.
    start: the first step.
    num_views: number of different augmented views an example has; 0 makes a new one each epoch.
    rows: those of each batch that are wanted, where several processes share it (`sharding.local_rows`); None: all.

  Returns:
    Iterator of the source's arrays, gathered, and 'view' int32 [batch_size].

  Raises:
    ValueError: the batch is larger than the source, or a number is out of its range. Raised here, not at
      the first batch.
  """
  check_seed(seed)
  check_whole("batch_size", batch_size, 1)
  check_whole("start", start, 0)
  check_whole("num_views", num_views, 0)
  if batch_size > len(source):
    raise ValueError(
      f"batch_size {batch_size} is more than the {len(source)} examples of {source.name}: "
      f"at most {len(source)}"
    )
  return _batches(source, batch_size, seed, start, num_views, slice(None) if rows is None else rows)


def eval_batches(
  source: Source, batch_size: int, *, rows: np.ndarray | None = None
) -> Iterator[HostBatch]:
  """Every example once, in order, in batches of one size.

  The last batch is filled up by repeating its last row; bool 'where' [batch_size] marks the real rows.
  'view' is 0. `rows` as in `batches`.

  Raises:
    ValueError: `batch_size` is not a whole number from 1.
  """
  check_whole("batch_size", batch_size, 1)
  return _eval_batches(source, batch_size, slice(None) if rows is None else rows)


def _batches(source, batch_size, seed, start, num_views, rows):
  per_epoch = len(source) // batch_size
  order, epoch = None, None
  for step in itertools.count(start):
    if order is None or step // per_epoch != epoch:
      epoch = step // per_epoch
      order = permutation(seed, epoch, len(source))
    first = step % per_epoch * batch_size
    view = epoch % num_views if num_views else epoch
    yield _gather(source, order[first : first + batch_size][rows], view)


def _eval_batches(source, batch_size, rows):
  for first in range(0, len(source), batch_size):
    places = np.arange(first, first + batch_size)[rows]
    batch = _gather(source, np.minimum(places, len(source) - 1), 0)
    yield batch | {"where": places < len(source)}


def _gather(source, rows, view) -> HostBatch:
  batch = {name: values.take(rows, axis=0) for name, values in source.arrays.items()}
  return batch | {"view": np.full(len(rows), view, np.int32)}


def permutation(seed, epoch, size) -> np.ndarray:
  sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
  return np.random.Generator(np.random.Philox(sequence)).permutation(size)


def check_whole(name, value, least):
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
