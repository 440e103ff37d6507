"""Rows of a complete cache at random."""

from typing import NoReturn

import numpy as np

from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.format import changed
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.pool import ShardPool
from distill_jax.cache.store.records import check_records

MEMORY = 2**32


class Table:
  """All rows of a cache, by example id and view. May be read by several threads.

  Args:
    store: where it lies.
    manifest: from `open_complete`.
    memory: bytes that the shards of an object store may take here.

  Raises:
    CorruptCache: a shard is not what should be there.
    StoreError: one cannot be read.
  """

  def __init__(self, store: Store, manifest: Manifest, memory: int = MEMORY):
    self.store, self.manifest = store, manifest
    self._shards = ShardPool(store, manifest, memory)
    self._per_shard, self._record = manifest.rows_per_shard, manifest.header(0).record
    self._one = len(manifest.plan) == 1
    self._checked = np.zeros(len(manifest.rows), bool)

  def read(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The rows of these examples: one copy, ids compared each time, checksums until each row was read once.

    Args:
      ids, views: integers [B].

    Returns:
      A structured array [B] whose fields are the columns and 'id', 'view', 'source_crc', 'crc'; read-only.

    Raises:
      ValueError: an id or a view is not in the cache.
      CorruptCache: a row was changed; shard and example are named.
    """
    numbers = self.manifest.rows.nearest(ids, views)
    records = self._gathered(numbers)
    if not ((records["id"] == ids) & (records["view"] == views)).all():
      self._refuse(records, ids, views)
    if not self._checked[numbers].all():
      # All at once: a call a row takes longer than the sums.
      if changed(records.view(np.uint8).data, self._record.itemsize):
        self._refuse(records, ids, views)
      self._checked[numbers] = True
    return records

  def _gathered(self, numbers: np.ndarray) -> np.ndarray:
    if not numbers.size:
      return np.empty(0, self._record)
    if self._one:
      return self._taken(0, numbers)
    shards = numbers // self._per_shard
    rows, first = numbers - shards * self._per_shard, int(shards[0])
    if (shards == first).all():
      return self._taken(first, rows)
    size, in_order = self._record.itemsize, shards.tolist()
    raw = {number: shard.raw for number, shard in self._shards.of(set(in_order)).items()}
    found = [raw[shard][at : at + size] for shard, at in zip(in_order, (rows * size).tolist())]
    return np.frombuffer(b"".join(found), self._record)

  def _taken(self, shard: int, rows: np.ndarray) -> np.ndarray:
    """Rows of one shard: NumPy's own loop, a tenth of the time of slices."""
    records = self._shards.of((shard,))[shard].records.take(rows)
    records.flags.writeable = False
    return records

  def _refuse(self, records, ids, views) -> NoReturn:
    """Says what is wrong with rows that are not those that were asked for, or were changed."""
    numbers = self.manifest.rows.numbers(ids, views)
    wrong = changed(records.view(np.uint8).data, self._record.itemsize)
    check_records(records, ids, views, lambda at: self._place(int(numbers[at])), wrong)
    raise AssertionError("the rows are right after all")

  def _place(self, number: int) -> tuple[str, int]:
    """For a message: the shard that holds a row, and which it is there."""
    shard, row = divmod(number, self._per_shard)
    return f"{self.store.url}/{self.manifest.plan.key(shard)}", row
