"""Times the cache's rows against the same bytes by hand: `np.memmap`, a file with a crc32 per row.

python tests/benchmarks/cache_bytes.py

Prints the ratios by wall clock and by this process' processor time, which other work on the machine
changes less.
"""

import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timing import Ratio, compare

from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import open_store
from distill_jax.cache.store.format import Column
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.row_reader import RowReader
from distill_jax.cache.store.rows import RowIndex


class Sizes(NamedTuple):
  """Sizes of a benchmark.

  Attributes:
    payload: bytes of a row.
    rows: number of rows.
    batch: rows that are read at once.
    epochs: number of passes over all rows.
    shards: number of shards.
  """

  payload: int
  rows: int
  batch: int
  epochs: int = 6
  shards: int = 1


def classes(quick: bool = False) -> Sizes:
  """Returns the sizes of 64 of 32,000 classes in 384 bytes, in batches of 128."""
  return Sizes(384, 200 if quick else 20_480, 8 if quick else 128)


def spread(quick: bool = False) -> Sizes:
  """Returns the same sizes in 16 shards, so that a batch has rows of all."""
  return classes(quick)._replace(shards=16)


def tokens(quick: bool = False) -> Sizes:
  """Returns the sizes of 512 tokens of 32 bytes, in batches of 8."""
  return Sizes(512 * 32, 20 if quick else 1_024, 8)


def read(sizes: Sizes, pairs: int, clock=time.perf_counter) -> Ratio:
  """Times every row in 6 epochs of random batches / fancy indexing of a memmap.

  The cache verifies checksums in the first epoch, and ids in all.
  """
  with tempfile.TemporaryDirectory() as folder:
    store, manifest, records = _write_cache(Path(folder), sizes)
    path = Path(folder) / "by_hand"
    records.tofile(path)
    order = [np.random.default_rng(i).permutation(sizes.rows) for i in range(sizes.epochs)]
    batches = [
      epoch[i : i + sizes.batch] for epoch in order for i in range(0, sizes.rows, sizes.batch)
    ]
    views = np.zeros(sizes.rows, np.int32)

    def ours(calls):
      table = RowReader(store, manifest)
      return [table.read(rows, views[: len(rows)])["payload"][0, 0] for rows in batches[:calls]]

    def theirs(calls):
      mapped = np.memmap(path, records.dtype, "r")
      return [mapped[rows]["payload"][0, 0] for rows in batches[:calls]]

    return compare(ours, theirs, pairs=pairs, calls=len(batches), clock=clock)


def write(sizes: Sizes, pairs: int, clock=time.perf_counter) -> Ratio:
  """Times a shard / the same records with a crc32 each, written to a file, synced and renamed."""
  with tempfile.TemporaryDirectory() as folder:
    store, manifest, records = _write_cache(Path(folder), sizes)
    columns = {"payload": np.ascontiguousarray(records["payload"])}
    crcs = np.zeros(sizes.rows, np.uint32)

    def ours(calls):
      for _ in range(calls):
        # An existing shard is not written again.
        store.path(manifest.plan.key(0)).unlink()
        shards.write_shard(store, manifest, 0, crcs, columns)

    def theirs(calls):
      for _ in range(calls):
        rows = np.zeros(sizes.rows, records.dtype)
        rows["id"] = np.arange(sizes.rows)
        rows["payload"] = columns["payload"]
        data = rows.tobytes()
        size = rows.dtype.itemsize
        rows["crc"] = [zlib.crc32(data[i : i + size - 4]) for i in range(0, len(data), size)]
        with open(Path(folder) / "new", "wb") as file:
          file.write(rows.tobytes())
          os.fsync(file.fileno())
        os.replace(Path(folder) / "new", Path(folder) / "by_hand")

    return compare(ours, theirs, pairs=pairs, calls=1, clock=clock)


def main() -> None:
  """Prints the table."""
  print(
    "| | ratio, wall clock | ratio, processor time | ours, ms | theirs, ms |\n|---|---|---|---|---|"
  )
  cases = {
    "read-classes": (read, classes()),
    "read-classes, 16 shards": (read, spread()),
    "read-tokens": (read, tokens()),
    "write": (write, classes()),
  }
  for name, (case, sizes) in cases.items():
    wall, busy = (case(sizes, 20, clock) for clock in (time.perf_counter, time.process_time))
    ours, theirs = (1000 * seconds for seconds in busy.medians)
    print(
      f"| {name} | {wall.value:.2f} | {busy.value:.2f} | {ours:.3f} | {theirs:.3f} |", flush=True
    )


def _write_cache(folder: Path, sizes: Sizes):
  """Returns the store, the manifest and the records of a complete cache of random bytes."""
  store = open_store(folder / "cache")
  rows = RowIndex(np.arange(sizes.rows))
  columns = (Column("payload", "uint8", (sizes.payload,)),)
  manifest = shards.begin(store, Manifest({}, columns, rows, -(-sizes.rows // sizes.shards)))
  payload = np.random.default_rng(0).integers(0, 256, (sizes.rows, sizes.payload), np.uint8)
  for number in range(len(manifest.plan)):
    part = payload[slice(*manifest.plan.span(number))]
    shards.write_shard(store, manifest, number, np.zeros(len(part), np.uint32), {"payload": part})
  shards.complete(store, manifest)
  records = [
    shards.open_shard(store, manifest, number).records for number in range(len(manifest.plan))
  ]
  return store, manifest, np.concatenate(records) if len(records) > 1 else records[0]


if __name__ == "__main__":
  main()
