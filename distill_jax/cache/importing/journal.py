"""Keeps the rows of an unfinished import in one file, to which each is appended when it arrives.

The file is a sequence of records of `store.format`, each with its own checksum, so a killed import
loses at most the record that it was writing. When all rows are there, shards are made of them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill_jax.cache.importing.row_checks import row_name
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.format import Header, corrupt_rows, pack
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.records import CorruptCache
from distill_jax.storage import files


class Journal:
  """The rows of a cache that have arrived, in the order in which they did.

  Attributes:
    is_stored: whether each row of the cache has arrived, bool [rows].

  Raises:
    OSError: the file cannot be read or written.
  """

  def __init__(self, folder: Path, manifest: Manifest):
    self.manifest = manifest
    self._path = folder / f"rows-{manifest.digest}"
    self._size = manifest.header(0).record_dtype.itemsize
    self._positions = np.full(len(manifest.rows), -1, np.int64)
    with files.naming(self._path):
      self._path.touch()
      # A killed process may have left the first part of a record, which the next one replaces.
      self._count = os.path.getsize(self._path) // self._size
    self._read()
    self._file = open(self._path, "r+b")

  @property
  def is_stored(self) -> np.ndarray:
    """Whether each row has arrived, bool [rows]."""
    return self._positions >= 0

  @property
  def missing_bytes(self) -> int:
    """Bytes that the rows take that have not arrived."""
    return int((self._positions < 0).sum()) * self._size

  def append(
    self, ids: np.ndarray, views: np.ndarray, crcs: np.ndarray, columns: Mapping[str, np.ndarray]
  ) -> None:
    """Writes rows; those that are here already must be the same.

    Args:
      ids, views, crcs: integers [B], of rows that differ.
      columns: arrays [B, *shape] of the manifest's columns.

    Raises:
      ValueError: a row has other values than one of an earlier call.
      OSError: the disk is full; the rows before are kept.
    """
    header = Header(self.manifest.digest, 0, 0, len(ids), self.manifest.columns)
    data = pack(header, ids, views, crcs, columns)[len(header.data) :]
    records = [data[first : first + self._size] for first in range(0, len(data), self._size)]
    numbers = self.manifest.rows.numbers(ids, views)
    for number, record, id, view in zip(numbers, records, ids, views):
      position = self._positions[number]
      if position < 0:
        with files.naming(self._path):
          os.pwrite(self._file.fileno(), record, self._count * self._size)
        self._positions[number] = self._count
        self._count += 1
      elif os.pread(self._file.fileno(), self._size, position * self._size) != record:
        raise ValueError(
          f"{row_name(id, view)}: expected the values that an earlier call imported, got others: "
          "import into another folder, or delete this one"
        )

  def write_shards(self, store: Store) -> None:
    """Writes the missing shards, once all rows are here.

    Raises:
      CorruptCache: a row was changed on disk.
      StoreError: a shard cannot be written.
    """
    records = self._records()
    for shard in shards.missing_shards(store, self.manifest):
      first, last = self.manifest.plan.span(shard)
      selected = records[self._positions[first:last]]
      if corrupt_rows(selected.reshape(-1).data, self._size):
        raise CorruptCache(str(self._path), "was changed while its rows were imported")
      rows = self._parse(selected)
      columns = {column.name: rows[column.name] for column in self.manifest.columns}
      shards.write_shard(store, self.manifest, shard, rows["source_crc"], columns)

  def close(self) -> None:
    """Closes the file, and keeps it."""
    self._file.close()

  def remove(self) -> None:
    """Removes the file: its rows are in shards."""
    self.close()
    self._path.unlink(missing_ok=True)

  def _read(self) -> None:
    records = self._records()
    valid = np.ones(self._count, bool)
    valid[corrupt_rows(records.reshape(-1).data, self._size)] = False
    if valid.any():
      rows = self._parse(records[valid])
      numbers = self.manifest.rows.numbers(rows["id"], rows["view"])
      self._positions[numbers] = np.flatnonzero(valid)

  def _records(self) -> np.ndarray:
    """Returns the bytes of all records, uint8 [records, size]: NumPy copies no gaps of structs."""
    shape = (self._count, self._size)
    return (
      np.memmap(self._path, np.uint8, "r", shape=shape) if self._count else np.zeros(shape, "B")
    )

  def _parse(self, records: np.ndarray) -> np.ndarray:
    return records.view(self.manifest.header(0).record_dtype)[:, 0]
