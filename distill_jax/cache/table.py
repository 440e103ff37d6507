"""Rows of a complete cache at random."""

import numpy as np

from distill_jax.cache.format import changed
from distill_jax.cache.manifest import Manifest
from distill_jax.cache.records import check_records
from distill_jax.cache.shards import open_shard
from distill_jax.cache.store import Store


class Table:
  """All rows of a cache, by example id and view. May be read by several threads.

  The shards of a local folder are mapped into memory; those of any other store are held in memory as they are read
  here, all of them.

  Args:
    store: where it lies.
    manifest: from `open_complete`.

  Raises:
    Damaged: a shard is not what should be there.
    StoreError: one cannot be read.
  """

  def __init__(self, store: Store, manifest: Manifest):
    self.manifest = manifest
    self._shards = [open_shard(store, manifest, number) for number in range(len(manifest.plan))]
    self._raw = [shard.raw for shard in self._shards]
    self._record = self._shards[0].header.record
    self._checked = np.zeros(len(manifest.rows), bool)

  def read(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The rows of these examples: one copy, ids compared each time, checksums the first time a row is read.

    Args:
      ids, views: integers [B].

    Returns:
      A structured array [B] whose fields are the columns and 'id', 'view', 'source_crc', 'crc'; read-only.

    Raises:
      ValueError: an id or a view is not in the cache.
      Damaged: a row was changed; shard and example are named.
    """
    numbers = self.manifest.rows.nearest(ids, views)
    shards, rows = np.divmod(numbers, self.manifest.rows_per_shard)
    raw, size = self._raw, self._record.itemsize
    found = [raw[shard][at : at + size] for shard, at in zip(shards.tolist(), (rows * size).tolist())]
    records = np.frombuffer(b"".join(found), self._record)
    right = (records["id"] == ids) & (records["view"] == views) & self._checked[numbers]
    if not right.all():  # the first time, or something is wrong
      self._check(records, found, ids, views)
    return records

  def _check(self, records, found, ids, views):
    numbers = self.manifest.rows.numbers(ids, views)
    new = np.flatnonzero(~self._checked[numbers]).tolist()
    wrong = [new[number] for number in changed(found[at] for at in new)]
    check_records(records, ids, views, lambda at: self._place(int(numbers[at])), wrong)
    self._checked[numbers] = True

  def _place(self, number: int) -> tuple[str, int]:
    """For a message: the shard that holds a row, and which it is there."""
    shard, row = divmod(number, self.manifest.rows_per_shard)
    return self._shards[shard].where, row
