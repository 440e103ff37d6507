"""Computes and writes the missing shards of a cache."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from distill_jax.cache.codecs.output_errors import check_errors
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.rows import shards_of_process
from distill_jax.cache.teacher_inputs import UNDECODABLE, TeacherInputs
from distill_jax.distributed.progress import writing_above
from distill_jax.types import Batch


class _ShardBatch(NamedTuple):
  """A batch of the rows of a shard.

  Attributes:
    shard: its number.
    is_last: whether the shard ends with it.
    num_rows: number of rows that count; the others only fill the batch.
    arrays: the inputs of all rows.
  """

  shard: int
  is_last: bool
  num_rows: int
  arrays: Batch


class _Part(NamedTuple):
  """The rows of a batch: checksums [count] and columns [count, ...]."""

  checksums: np.ndarray
  columns: dict[str, np.ndarray]


class ColumnPredictor(Protocol):
  """What computes the columns of a batch: a `Predictor`, or a `Decoder` of sequences."""

  @property
  def start(self) -> Callable[[Batch, Executor], Callable[[], Any]]:
    """Begins to compute a batch, and returns a function that waits for `(columns, errors)`."""

  @property
  def num_ahead(self) -> int:
    """Number of batches to start before the first one is finished."""


def fill_missing(
  store: Store,
  manifest: Manifest,
  inputs: TeacherInputs,
  predictor: ColumnPredictor,
  *,
  batch_size: int,
  part: tuple[int, int] | None,
  progress: bool,
) -> None:
  """Writes this process' part of the missing shards, then helps with the others.

  Args:
    store, manifest: the cache.
    inputs: the examples.
    predictor: computes the columns of a batch.
    batch_size: rows that the teacher takes at once.
    part: (index, count) of this process; None: that of the JAX process.
    progress: whether to show a progress bar.
  """
  missing = shards.missing_shards(store, manifest)
  names = tuple(manifest.identity["data"]["inputs"])
  checksum = functools.partial(inputs.checksums, names=names)
  index, count = part or (jax.process_index(), jax.process_count())
  rows = _num_rows(manifest, missing)
  bar = progress_bar(None, "cache", " rows", progress, total=rows)
  worker = ThreadPoolExecutor(1, "teacher")
  with bar, writing_above(bar):
    try:
      todo = shards_of_process(missing, index, count)
      while missing:
        batches = _batches(inputs, manifest, todo, batch_size)
        parts: list[_Part] = []
        for batch, finish in _computed_ahead(predictor, batches, worker):
          parts.append(_finish(batch, finish, checksum))
          bar.update(batch.num_rows)
          if batch.is_last:
            shards.write_shard(store, manifest, batch.shard, *_concatenate(parts))
            parts = []
        missing = shards.missing_shards(store, manifest)
        # The other processes go through their shards from the first on: help from the last.
        todo = missing[-1:]
    finally:
      # After an error nothing more is computed.
      worker.shutdown(cancel_futures=True)
  if progress:
    print(f"cache: wrote {len(manifest.rows):,} rows to {store.url}", flush=True)


def progress_bar(
  items: Iterable[Any] | None, title: str, unit: str, progress: bool, **options: Any
) -> tqdm:
  """Returns a bar on a terminal, a line at the end elsewhere, or nothing."""
  return tqdm(items, desc=title, unit=unit, disable=None if progress else True, **options)


def _num_rows(manifest: Manifest, numbers: Iterable[int]) -> int:
  spans = [manifest.plan.span(number) for number in numbers]
  return sum(last - first for first, last in spans)


def _batches(
  inputs: TeacherInputs, manifest: Manifest, numbers: Iterable[int], batch_size: int
) -> Iterator[_ShardBatch]:
  """Yields the batches of these shards, all of one size, for one program."""
  for number in numbers:
    ids, views = manifest.rows.ids_and_views(*manifest.plan.span(number))
    for first in range(0, len(ids), batch_size):
      last = min(first + batch_size, len(ids))
      rows = np.minimum(np.arange(first, first + batch_size), len(ids) - 1)
      arrays = inputs.batch(ids[rows], views[rows])
      yield _ShardBatch(number, last == len(ids), last - first, arrays)


def _computed_ahead(
  predictor: ColumnPredictor, batches: Iterable[_ShardBatch], worker: Executor
) -> Iterator[tuple[_ShardBatch, Callable[[], Any]]]:
  """Yields batches and what waits for their results, when the next ones are under way: the teacher
  computes them while the caller copies, encodes and writes this one."""
  started: collections.deque[tuple[_ShardBatch, Callable[[], Any]]] = collections.deque()
  for batch in batches:
    started.append((batch, predictor.start(batch.arrays, worker)))
    if len(started) > predictor.num_ahead:
      yield started.popleft()
  yield from started


def _finish(
  batch: _ShardBatch, finish: Callable[[], Any], checksum: Callable[[Batch], np.ndarray]
) -> _Part:
  """Waits for a batch and checks its outputs."""
  columns, errors = finish()
  arrays, count = batch.arrays, batch.num_rows
  checksums = checksum(arrays)[:count]
  for name, row_errors in errors.items():
    # The outputs for an undecodable image are never read, so they may have errors.
    row_errors = row_errors[:count] * (checksums != UNDECODABLE)
    check_errors(name, row_errors, arrays["id"], arrays["view"])
  return _Part(checksums, {name: x[:count] for name, x in columns.items()})


def _concatenate(parts: list[_Part]) -> _Part:
  """Returns the rows of all batches of a shard."""
  names = parts[0].columns
  columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
  return _Part(np.concatenate([part.checksums for part in parts]), columns)
