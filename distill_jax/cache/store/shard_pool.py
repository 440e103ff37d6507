"""Opens the shards of a cache: memory-maps local files, reads remote objects and the next ones."""

import threading
import warnings
from collections.abc import Collection

import tensorstore as ts

from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.records import Shard
from distill_jax.cache.store.shards import open_shard, parse_shard

MAX_MAPPED = 512  # files at once: each takes one of the process' file descriptors


class ShardPool:
  """The open shards of a complete cache. Several threads may use it.

  Shards of a local folder are checked and mapped when the pool is built. Shards of another store
  are read on demand, several at once; while they are in use, the ones that follow in the order of
  the rows (those of the next view) are read ahead.

  Args:
    store: location of the cache.
    manifest: from `open_complete`.
    memory: bytes that the shards of an object store may take in this process.

  Raises:
    CorruptCache: a shard is not the expected one.
    StoreError: a shard cannot be read.
  """

  def __init__(self, store: Store, manifest: Manifest, memory: int):
    self._store = store
    self._manifest = manifest
    self._is_local = store.folder is not None
    shard_bytes = manifest.header(0).size
    self._max_shards = MAX_MAPPED if self._is_local else max(1, memory // shard_bytes)
    self._shards_per_view = _shards_per_view(manifest)
    self._shards: dict[int, Shard] = {}  # in the order in which they were opened
    self._reads: dict[int, ts.Future] = {}
    self._next_reads: list[int] = []
    self._lock = threading.Lock()
    self._warned = False
    if self._is_local:
      for number in range(len(manifest.plan)):
        self._add(number)

  def open(self, numbers: Collection[int]) -> dict[int, Shard]:
    """Returns the shards of these numbers.

    Raises:
      CorruptCache: a shard is not the expected one.
      Incomplete: a shard is missing.
      StoreError: a shard cannot be read.
    """
    shards = {
      number: shard for number in numbers if (shard := self._shards.get(number)) is not None
    }
    if len(shards) < len(numbers):
      with self._lock:
        shards = self._open_missing(numbers)
    if self._next_reads:
      with self._lock:
        self._read_ahead()
    return shards

  def _open_missing(self, numbers: Collection[int]) -> dict[int, Shard]:
    shards = {number: self._shards[number] for number in numbers if number in self._shards}
    missing = [number for number in numbers if number not in shards]
    if not self._is_local:
      for number in missing:
        self._begin_read(number)
    for number in missing:
      shards[number] = self._add(number)
    if not self._is_local:
      self._plan_reads(max(numbers))
    return shards

  def _add(self, number: int) -> Shard:
    """Opens one shard, or waits for its read, and keeps it."""
    read = self._reads.pop(number, None)
    if read is None:
      shard = open_shard(self._store, self._manifest, number)
    else:
      data = self._store.result(self._manifest.plan.key(number), read)
      shard = parse_shard(self._store, self._manifest, number, data)
    self._make_room()
    self._shards[number] = shard
    return shard

  def _make_room(self) -> None:
    """Drops the oldest open shards until one more fits."""
    while self._shards and len(self._shards) + len(self._reads) >= self._max_shards:
      # Rows are stored view by view: the shard that was opened first belongs to an earlier view.
      oldest = next(iter(self._shards))
      del self._shards[oldest]

  def _begin_read(self, number: int) -> None:
    if number not in self._reads:
      self._make_room()
      self._reads[number] = self._store.begin_read(self._manifest.plan.key(number))

  def _plan_reads(self, last: int) -> None:
    """Lists the shards after `last` to read ahead: one view's, as far as there is room."""
    total = len(self._manifest.plan)
    room = self._max_shards - self._shards_per_view
    if room < 0 and not self._warned:
      self._warned = True
      warnings.warn(
        f"memory: expected room for the {self._shards_per_view} shards of a view of the cache in "
        f"{self._store.url}, got room for {self._max_shards}, so each is read repeatedly: "
        "raise memory, or copy the cache to a local folder",
        stacklevel=2,
      )
    count = min(self._shards_per_view, max(room, 0))
    following = [(last + 1 + offset) % total for offset in range(count)]
    self._next_reads = [n for n in following if n not in self._shards and n not in self._reads]

  def _read_ahead(self) -> None:
    if self._next_reads and all(read.done() for read in self._reads.values()):
      self._begin_read(self._next_reads.pop(0))


def _shards_per_view(manifest: Manifest) -> int:
  """Returns how many shards the rows of one view touch at most."""
  examples = len(manifest.rows.ids)
  full_shards = -(-examples // manifest.rows_per_shard)
  starts_within_shard = examples % manifest.rows_per_shard > 0
  return min(full_shards + starts_within_shard, len(manifest.plan))
