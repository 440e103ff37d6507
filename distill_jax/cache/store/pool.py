"""A cache's shards as they are needed: mapped into memory, or read from an object store, some ahead of time."""

import threading
import warnings
from collections.abc import Collection

import tensorstore as ts

from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.manifest import Manifest
from distill_jax.cache.store.records import Shard
from distill_jax.cache.store.shards import open_shard, shard_of

MAPPED = 512  # files at once: each takes one of a process' file descriptors


class ShardPool:
  """The shards of a complete cache. May be used by several threads.

  Those of a local folder are looked at here and mapped; those of another store are read when they are asked for,
  several at once, and the ones that follow in the order of the rows (the next view's) while others are in use.

  Args:
    store: where they lie.
    manifest: from `open_complete`.
    memory: bytes that those of an object store may take here.

  Raises:
    CorruptCache: a shard is not what should be there.
    StoreError: one cannot be read.
  """

  def __init__(self, store: Store, manifest: Manifest, memory: int):
    self._store, self._manifest = store, manifest
    size = manifest.header(0).size
    self._most = MAPPED if store.folder is not None else max(1, memory // size)
    per_shard, examples = manifest.rows_per_shard, len(manifest.rows.ids)
    touched = -(-examples // per_shard) + (examples % per_shard > 0)
    self._per_view = min(touched, len(manifest.plan))
    self._open: dict[int, Shard] = {}  # in the order in which they were opened
    self._coming: dict[int, ts.Future] = {}
    self._ahead: list[int] = []
    self._lock = threading.Lock()
    self._warned = False
    if store.folder is not None:
      for number in range(len(manifest.plan)):
        shard = open_shard(store, manifest, number)
        self._make_room()
        self._open[number] = shard

  def of(self, numbers: Collection[int]) -> dict[int, Shard]:
    """The shards of these numbers.

    Raises:
      CorruptCache: one is not what should be there.
      Incomplete: one has gone.
      StoreError: one cannot be read.
    """
    found = {number: shard for number in numbers if (shard := self._open.get(number)) is not None}
    if len(found) < len(numbers):
      with self._lock:
        found = self._opened(numbers)
    if self._ahead:
      with self._lock:
        self._read_ahead()
    return found

  def _opened(self, numbers) -> dict[int, Shard]:
    found = {number: self._open[number] for number in numbers if number in self._open}
    absent = [number for number in numbers if number not in found]
    if self._store.folder is None:
      for number in absent:
        self._begin(number)
    for number in absent:
      found[number] = self._read(number)
      self._make_room()
      self._open[number] = found[number]
    if self._store.folder is None:
      self._plan_ahead(max(numbers))
    return found

  def _read(self, number: int) -> Shard:
    coming = self._coming.pop(number, None)
    if coming is None:
      return open_shard(self._store, self._manifest, number)
    data = self._store.result(self._manifest.plan.key(number), coming)
    return shard_of(self._store, self._manifest, number, data)

  def _make_room(self) -> None:
    """For one more."""
    while self._open and len(self._open) + len(self._coming) >= self._most:
      del self._open[
        next(iter(self._open))
      ]  # rows lie view by view: the one opened first is of an earlier view

  def _begin(self, number: int) -> None:
    if number not in self._coming:
      self._make_room()
      self._coming[number] = self._store.begin_read(self._manifest.plan.key(number))

  def _plan_ahead(self, last: int) -> None:
    """As many as one view has, from the last one in use on, where there is room for them too."""
    total, room = len(self._manifest.plan), self._most - self._per_view
    if room < 0 and not self._warned:
      self._warned = True
      warnings.warn(
        f"a view of the cache in {self._store.url} lies in {self._per_view} shards, and memory= holds {self._most}: "
        "they are read again and again. Give more, or copy the cache to a local folder",
        stacklevel=2,
      )
    following = [(last + 1 + i) % total for i in range(min(self._per_view, max(room, 0)))]
    self._ahead = [n for n in following if n not in self._open and n not in self._coming]

  def _read_ahead(self) -> None:
    if self._ahead and all(coming.done() for coming in self._coming.values()):
      self._begin(self._ahead.pop(0))
