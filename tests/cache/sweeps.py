"""Sweeps corruption and kills: corrupt caches are rejected, the next writer completes a killed one.

`python tests/cache/sweeps.py` runs the full sweeps; the tests run five of each.
`python tests/cache/sweeps.py write FOLDER INDEX COUNT` is a writer, to be killed or run next to
others.
"""

import contextlib
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import StoreError, open_store
from distill_jax.cache.store.format import Column
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.row_reader import RowReader
from distill_jax.cache.store.rows import RowIndex, shards_of_process

COLUMNS = (Column("logits", "float16", (10,)), Column("top", "uint8", (3,)))


def manifest(examples=23, num_views=2, per_shard=10, columns=COLUMNS, **identity):
  ids = np.random.default_rng(examples).permutation(3 * examples)[:examples]
  return Manifest({"teacher": "a", **identity}, columns, RowIndex(ids, num_views), per_shard)


def values(rows, columns=COLUMNS):
  """Returns the columns of rows, a function of their numbers."""
  made = {}
  for column in columns:
    random_bytes = [
      np.random.default_rng([row, len(column.name)]).bytes(
        np.dtype(column.dtype).itemsize * int(np.prod(column.shape))
      )
      for row in rows
    ]
    made[column.name] = np.frombuffer(b"".join(random_bytes), column.dtype).reshape(
      len(rows), *column.shape
    )
  return made


def write(store, plan, todo):
  for shard in todo:
    rows = np.arange(*plan.plan.span(shard))
    shards.write_shard(store, plan, shard, rows * 7, values(rows, plan.columns))


def make(folder, **changes):
  """Writes a complete small cache."""
  store = open_store(folder)
  plan = shards.begin(store, manifest(**changes))
  write(store, plan, shards.missing_shards(store, plan))
  shards.complete(store, plan)
  return store, plan


def read_all(store, batch=8, seed=0):
  """Compares every row in random batches, as a run reads them, then reads every byte."""
  plan = shards.open_complete(store)
  ids, views = plan.rows.ids_and_views(0, len(plan.rows))
  expected = values(np.arange(len(ids)), plan.columns)
  table = RowReader(store, plan)
  order = np.random.default_rng(seed).permutation(len(ids))
  for rows in np.split(order, range(batch, len(ids), batch)):
    records = table.read(ids[rows], views[rows])
    for name, wanted in expected.items():
      if records[name].tobytes() != wanted[rows].tobytes():
        raise AssertionError(f"rows {rows}: {name} differs without an error")
  shards.complete(store, plan)


def full_check(store):
  shards.complete(store, shards.open_complete(store))


@contextlib.contextmanager
def corrupted(path, change):
  """Changes the bytes of a file within the context."""
  before = path.read_bytes()
  after = bytearray(before)
  change(after)
  assert after != before
  path.write_bytes(after)
  try:
    yield before, bytes(after)
  finally:
    path.write_bytes(before)


def flip(draw):
  def change(data):
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << (bit % 8)

  return change


def overwrite(draw):
  def change(data):
    at = draw.randrange(len(data) - 63)
    data[at : at + 64] = draw.randbytes(64)

  return change


def cut(draw):
  def change(data):
    del data[draw.randrange(len(data)) :]

  return change


def check_rejected(store, path, change, seed):
  """Checks that one change makes reads of rows and of everything raise, with file and example."""
  plan = shards.open_complete(store)
  with corrupted(path, change) as (before, after):
    for read in (full_check, lambda store: read_all(store, seed=seed)):
      try:
        read(store)
      except CorruptCache as error:
        check_text(str(error), plan, path.name, before, after, first=read is full_check)
      else:
        raise AssertionError(f"{path.name}: the corruption was not noticed")


def check_text(text, plan, key, before, after, first):
  """Checks that the message names the file and, where only rows differ, a corrupt row.

  A read in order names the first one.
  """
  assert key in text, text
  shard = next(plan.plan.shard_numbers([key]), None)
  if shard is None or len(before) != len(after):
    return
  header = plan.header(shard)
  start, size = len(header.data), header.record_dtype.itemsize
  if before[:start] != after[:start]:
    return
  changed = [
    n for n in range(header.rows) if _row(before, start, size, n) != _row(after, start, size, n)
  ]
  ids, views = plan.rows.ids_and_views(*plan.plan.span(shard))
  named = [f"row {n} (example id {ids[n]}, view {views[n]})" for n in changed]
  assert any(name in text for name in (named[:1] if first else named)), (text, named)


def _row(data, start, size, number):
  return data[start + number * size : start + (number + 1) * size]


def sweep(folder, kind, count, seed):
  """Applies `count` random changes of one kind to the files of a cache, shards most of all."""
  store, plan = make(folder)
  draw = random.Random(seed)
  files = [Path(folder) / key for key in store.keys()]
  likely = [1 if file.name.startswith("shard-") else 0.1 for file in files]
  for number in range(count):
    check_rejected(store, draw.choices(files, likely)[0], kind(draw), number)
  read_all(store)


def sweep_mixed_up(folder, limit=None):
  """Swaps shards, and inserts those of another teacher or of another division of the rows."""
  folder = Path(folder)
  store, plan = make(folder / "cache")
  others = [make(folder / "teacher", teacher="b"), make(folder / "division", per_shard=9)]
  keys = [plan.plan.key(shard) for shard in range(len(plan.plan))]
  pairs = [(folder / "cache" / a, folder / "cache" / b) for a in keys for b in keys if a != b]
  pairs += [
    (folder / "cache" / key, Path(other.folder) / key) for other, _ in others for key in keys
  ]
  for at, (path, source) in enumerate(pairs[:limit] if limit else pairs):
    data = source.read_bytes()
    check_rejected(store, path, lambda old, data=data: old.__setitem__(slice(None), data), at)
  return len(pairs[:limit] if limit else pairs)


BIG = dict(examples=300, num_views=2, per_shard=50, columns=(Column("states", "float16", (1000,)),))


def contents(folder):
  """Returns the digest of every file in a folder."""
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()
  }


def writer(folder, index=0, count=1):
  return subprocess.Popen(
    [sys.executable, __file__, "write", str(folder), str(index), str(count)],
    stdout=subprocess.PIPE,
    text=True,
  )


def writer_main(folder, index, count):
  store = open_store(folder)
  plan = shards.begin(store, manifest(**BIG))
  print("begun", flush=True)
  write(store, plan, shards_of_process(shards.missing_shards(store, plan), int(index), int(count)))
  while todo := shards.missing_shards(store, plan):
    write(store, plan, todo)
  shards.complete(store, plan)


def sweep_kills(folder, count, seed):
  """Kills writers at random moments; the next one ends with the bytes of an undisturbed one.

  Returns:
    How many were killed between the first shard and the last, and how many left an unfinished file.
  """
  folder, draw = Path(folder), random.Random(seed)
  began = time.monotonic()
  make(folder / "whole", **BIG)
  duration, expected = time.monotonic() - began, contents(folder / "whole")
  midway = unfinished = 0
  for number in range(count):
    killed = folder / str(number)
    with writer(killed) as process:
      process.stdout.readline()
      time.sleep(draw.uniform(0, duration))
      process.send_signal(signal.SIGKILL)
    store, plan = open_store(killed), manifest(**BIG)
    left = [file for file in killed.iterdir() if file.name.endswith(".__lock")]
    assert not [key for key in store.keys() if key.endswith(".__lock")]
    midway += 0 < len(shards.missing_shards(store, plan)) < len(plan.plan)
    unfinished += bool(left)
    plan = shards.begin(store, plan)
    write(store, plan, shards.missing_shards(store, plan))
    shards.complete(store, plan)
    assert contents(killed) == expected, f"kill {number}: other bytes than undisturbed"
  return midway, unfinished


def full_disk_main(folder):
  """Fills a small disk: the error is clear, written shards remain, and with space it resumes."""
  store = open_store(folder)
  filler = Path(folder) / "filler"
  filler.write_bytes(bytes(800_000))
  plan = shards.begin(store, manifest(columns=(Column("states", "float16", (5000,)),)))
  try:
    write(store, plan, shards.missing_shards(store, plan))
  except StoreError as error:
    print(error)
  before = shards.missing_shards(store, plan)
  for shard in set(range(len(plan.plan))) - set(before):
    shards.open_shard(store, plan, shard).check(*plan.rows.ids_and_views(*plan.plan.span(shard)))
  filler.unlink()
  write(store, plan, before)
  shards.complete(store, plan)
  print(len(before), "of", len(plan.plan), "were missing")


def main():
  for name, run in {
    "400 bit flips": lambda folder: sweep(folder, flip, 400, seed=1),
    "100 overwritten runs of 64 bytes": lambda folder: sweep(folder, overwrite, 100, seed=2),
    "100 truncations": lambda folder: sweep(folder, cut, 100, seed=3),
    "swapped and foreign shards": sweep_mixed_up,
    "40 kills": lambda folder: sweep_kills(folder, 40, seed=4),
  }.items():
    with tempfile.TemporaryDirectory() as folder:
      began = time.monotonic()
      result = run(folder)
      print(
        f"{name}: all noticed or completed in {time.monotonic() - began:.1f} s",
        result or "",
        flush=True,
      )


if __name__ == "__main__":
  commands = {"write": writer_main, "full-disk": full_disk_main}
  commands[sys.argv[1]](*sys.argv[2:]) if len(sys.argv) > 1 else main()
