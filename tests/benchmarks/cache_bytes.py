"""The cache's rows / the same bytes by hand: a structured `np.memmap`, a file with a crc32 of each row."""

import os
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timing import Ratio, compare

from distill_jax.cache import shards
from distill_jax.cache.format import Column
from distill_jax.cache.manifest import Manifest
from distill_jax.cache.rows import Rows
from distill_jax.cache.store import open_store
from distill_jax.cache.table import Table


class Sizes(NamedTuple):
  """Rows of so many bytes, read in batches."""

  payload: int
  rows: int
  batch: int
  epochs: int = 6


def classes(quick: bool = False) -> Sizes:
  """64 of 32,000 classes in 384 bytes, batches of 128."""
  return Sizes(384, 200 if quick else 20_480, 8 if quick else 128)


def tokens(quick: bool = False) -> Sizes:
  """512 tokens of 32 bytes, batches of 8."""
  return Sizes(512 * 32, 20 if quick else 1_024, 8)


def read(sizes: Sizes, pairs: int) -> Ratio:
  """Every row in 6 epochs of random batches, checksums in the first, ids in all / fancy indexing of a memmap."""
  with tempfile.TemporaryDirectory() as folder:
    store, made, records = _written(Path(folder), sizes)
    path = Path(folder) / "by_hand"
    records.tofile(path)
    order = [np.random.default_rng(i).permutation(sizes.rows) for i in range(sizes.epochs)]
    places = [epoch[i : i + sizes.batch] for epoch in order for i in range(0, sizes.rows, sizes.batch)]
    views = np.zeros(sizes.rows, np.int32)

    def ours(calls):
      table = Table(store, made)
      return [table.read(at, views[: len(at)])["payload"][0, 0] for at in places[:calls]]

    def theirs(calls):
      mapped = np.memmap(path, records.dtype, "r")
      return [mapped[at]["payload"][0, 0] for at in places[:calls]]

    return compare(ours, theirs, pairs=pairs, calls=len(places))


def write(sizes: Sizes, pairs: int) -> Ratio:
  """A shard written whole / the same records with a crc32 each, written to a file, synced and renamed."""
  with tempfile.TemporaryDirectory() as folder:
    store, made, records = _written(Path(folder), sizes)
    columns, crcs = {"payload": np.ascontiguousarray(records["payload"])}, np.zeros(sizes.rows, np.uint32)

    def ours(calls):
      for _ in range(calls):
        shards.write_shard(store, made, 0, crcs, columns)

    def theirs(calls):
      for _ in range(calls):
        filled = np.zeros(sizes.rows, records.dtype)
        filled["id"], filled["payload"] = np.arange(sizes.rows), columns["payload"]
        data = filled.tobytes()
        size = filled.dtype.itemsize
        filled["crc"] = [zlib.crc32(data[at : at + size - 4]) for at in range(0, len(data), size)]
        with open(Path(folder) / "new", "wb") as file:
          file.write(filled.tobytes())
          os.fsync(file.fileno())
        os.replace(Path(folder) / "new", Path(folder) / "by_hand")

    return compare(ours, theirs, pairs=pairs, calls=1)


def _written(folder: Path, sizes: Sizes):
  store = open_store(folder / "cache")
  rows = Rows(np.arange(sizes.rows))
  made = shards.begin(store, Manifest({}, (Column("payload", "uint8", (sizes.payload,)),), rows, sizes.rows))
  payload = np.random.default_rng(0).integers(0, 256, (sizes.rows, sizes.payload), np.uint8)
  shards.write_shard(store, made, 0, np.zeros(sizes.rows, np.uint32), {"payload": payload})
  shards.complete(store, made)
  return store, made, shards.open_shard(store, made, 0).records
