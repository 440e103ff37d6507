"""The cache's rows / the same bytes by hand: a structured `np.memmap`, a file with a crc32 of each row.

python tests/benchmarks/cache_bytes.py

prints the ratios by the clock on the wall and by this process' processor time, which others on the machine move less.
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
  """Rows of so many bytes, read in batches; `shards` of them in all."""

  payload: int
  rows: int
  batch: int
  epochs: int = 6
  shards: int = 1


def classes(quick: bool = False) -> Sizes:
  """64 of 32,000 classes in 384 bytes, batches of 128."""
  return Sizes(384, 200 if quick else 20_480, 8 if quick else 128)


def spread(quick: bool = False) -> Sizes:
  """The same in 16 shards, so that a batch has rows of all."""
  return classes(quick)._replace(shards=16)


def tokens(quick: bool = False) -> Sizes:
  """512 tokens of 32 bytes, batches of 8."""
  return Sizes(512 * 32, 20 if quick else 1_024, 8)


def read(sizes: Sizes, pairs: int, clock=time.perf_counter) -> Ratio:
  """Every row in 6 epochs of random batches, checksums in the first, ids in all / fancy indexing of a memmap."""
  with tempfile.TemporaryDirectory() as folder:
    store, made, records = _written(Path(folder), sizes)
    path = Path(folder) / "by_hand"
    records.tofile(path)
    order = [np.random.default_rng(i).permutation(sizes.rows) for i in range(sizes.epochs)]
    places = [
      epoch[i : i + sizes.batch] for epoch in order for i in range(0, sizes.rows, sizes.batch)
    ]
    views = np.zeros(sizes.rows, np.int32)

    def ours(calls):
      table = RowReader(store, made)
      return [table.read(at, views[: len(at)])["payload"][0, 0] for at in places[:calls]]

    def theirs(calls):
      mapped = np.memmap(path, records.dtype, "r")
      return [mapped[at]["payload"][0, 0] for at in places[:calls]]

    return compare(ours, theirs, pairs=pairs, calls=len(places), clock=clock)


def write(sizes: Sizes, pairs: int, clock=time.perf_counter) -> Ratio:
  """A shard written whole / the same records with a crc32 each, written to a file, synced and renamed."""
  with tempfile.TemporaryDirectory() as folder:
    store, made, records = _written(Path(folder), sizes)
    columns, crcs = (
      {"payload": np.ascontiguousarray(records["payload"])},
      np.zeros(sizes.rows, np.uint32),
    )

    def ours(calls):
      for _ in range(calls):
        store.path(made.plan.key(0)).unlink()  # what is there stays
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

    return compare(ours, theirs, pairs=pairs, calls=1, clock=clock)


def main() -> None:
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


def _written(folder: Path, sizes: Sizes):
  store = open_store(folder / "cache")
  rows, columns = RowIndex(np.arange(sizes.rows)), (Column("payload", "uint8", (sizes.payload,)),)
  made = shards.begin(store, Manifest({}, columns, rows, -(-sizes.rows // sizes.shards)))
  payload = np.random.default_rng(0).integers(0, 256, (sizes.rows, sizes.payload), np.uint8)
  for number in range(len(made.plan)):
    part = payload[slice(*made.plan.span(number))]
    shards.write_shard(store, made, number, np.zeros(len(part), np.uint32), {"payload": part})
  shards.complete(store, made)
  held = [shards.open_shard(store, made, number).records for number in range(len(made.plan))]
  return store, made, np.concatenate(held) if len(held) > 1 else held[0]


if __name__ == "__main__":
  main()
