"""The bookkeeping of a cache: which of its shards are there, and that it is whole.

A folder holds

    manifest.json       what the cache is; created by whoever comes first
    ids-DIGEST          ids of the N examples, in the order of their rows, int64, little-endian
    shard-00000000 ...  rows as `format` has them
    head-DIGEST         of a language model's hidden states, the head that makes logits of them (`heads`)
    complete.json       written last, after every shard was read back: how many bytes the shards have, and the sha256
                        of all of them one after the other (`cat shard-* | sha256sum`)

Nothing is locked, nothing appended to. Writers that come at once divide the missing shards among them, or write the
same bytes twice. Both JSON files hold a sha256 of themselves.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.cache.store import manifest as manifests
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.format import pack
from distill_jax.cache.store.manifest import Manifest, Same
from distill_jax.cache.store.records import CorruptCache, Shard

COMPLETE = "complete.json"
Track = Callable[[range], Iterable[int]]


class Incomplete(OSError):
  """There is no cache, or a part of it is missing."""


def begin(store: Store, manifest: Manifest, same: Same | None = None) -> Manifest:
  """Begin a cache, or go on with the one that is there.

  Args:
    same: what counts as equal; None: `==`.

  Returns:
    The manifest that stands: this one, or that of whoever came first, who also chose how rows are divided into
    shards. Shards are written with it.

  Raises:
    Mismatch: another cache is there; the fields are named.
    CorruptCache: what is there was changed.
    StoreError: the store cannot be read or written.
  """
  found = manifests.load(store)
  if found is None:
    # The ids go first: a manifest is never without them.
    store.put(manifests.ids_key(manifest.body["ids"]), manifest.ids)
    if store.create(manifests.KEY, manifests.seal(manifest.body, manifest.provenance)):
      return manifest
    found = manifests.load(store)
    assert found is not None
  manifests.check(store, found.body, manifest.body, same)
  return found


def missing(store: Store, manifest: Manifest) -> list[int]:
  """Numbers of the planned shards that are not there.

  Raises:
    StoreError: the store cannot be listed.
  """
  present = set(manifest.plan.planned(store.keys("shard-")))
  return [shard for shard in range(len(manifest.plan)) if shard not in present]


def write_shard(
  store: Store,
  manifest: Manifest,
  shard: int,
  source_crcs: np.ndarray,
  columns: Mapping[str, np.ndarray],
) -> int:
  """Write one shard whole.

  Args:
    source_crcs: of the examples in the order of `manifest.rows.at(*manifest.plan.span(shard))`, integers [rows].
    columns: arrays [rows, *shape] of the manifest's columns.

  Returns:
    How many bytes it has.

  Raises:
    ValueError: a column has another name, shape or dtype.
    StoreError: it cannot be written; the shards before it stay.
  """
  ids, views = manifest.rows.at(*manifest.plan.span(shard))
  data = pack(manifest.header(shard), ids, views, source_crcs, columns)
  # A straggler must not replace what others have read back: its rows may differ in their last bits.
  store.create(manifest.plan.key(shard), data)
  return len(data)


def open_shard(store: Store, manifest: Manifest, shard: int) -> Shard:
  """Map a shard into memory, or read it where it is no local file; its rows are still to be checked.

  Raises:
    Incomplete: it is not there.
    CorruptCache: it is not the shard that should be there.
    StoreError: it cannot be read.
  """
  key = manifest.plan.key(shard)
  path = store.path(key)
  return shard_of(store, manifest, shard, store.read(key) if path is None else mapped(path))


def shard_of(store: Store, manifest: Manifest, shard: int, data: bytes | mmap.mmap | None) -> Shard:
  """As `open_shard`, of what was read; None where nothing is."""
  if data is None:
    raise Incomplete(f"shard {shard} of the cache in {store.url} is missing")
  return Shard(data, f"{store.url}/{manifest.plan.key(shard)}", manifest.header(shard))


def complete(store: Store, manifest: Manifest, track: Track = iter) -> dict[str, Any]:
  """Read every byte of a cache back, check it, and write down that it is whole.

  Done again it is the full check of a cache: nothing is written, and the record must agree.

  Args:
    track: what the shards' numbers pass through, e.g. `tqdm`.

  Returns:
    The record: 'rows', 'bytes', 'sha256', and the manifest's digest.

  Raises:
    Incomplete: shards are missing.
    CorruptCache: a shard or the record was changed; shard and example are named.
    StoreError: something cannot be read or written.
  """
  _refuse_gaps(store, manifest)
  whole, size = hashlib.sha256(), 0
  for number in track(range(len(manifest.plan))):
    shard = open_shard(store, manifest, number)
    shard.check(*manifest.rows.at(*manifest.plan.span(number)))
    whole.update(shard.data)
    size += len(shard.data)
  record = {
    "manifest": manifest.digest,
    "rows": len(manifest.rows),
    "bytes": size,
    "sha256": whole.hexdigest(),
  }
  if not store.create(COMPLETE, manifests.seal(record)) and _record(store, manifest) != record:
    raise CorruptCache(
      f"{store.url}/{COMPLETE}", f"does not agree with the shards, which have {record}"
    )
  return record


def open_complete(
  store: Store, identity: Mapping[str, Any] | None = None, same: Same | None = None
) -> Manifest:
  """The manifest of a cache that may be read: all of it is there, and it was read back when it was written.

  Args:
    identity: what it must be; None: anything.
    same: what counts as equal; None: `==`.

  Raises:
    Incomplete: there is no cache, or shards are missing, or it was never read back.
    Mismatch: it is another one; the fields are named.
    CorruptCache: manifest or completion record were changed.
    StoreError: the store cannot be read.
  """
  manifest = manifests.load(store)
  if manifest is None:
    raise Incomplete(f"there is no cache in {store.url}")
  if identity is not None:
    manifests.check(store, manifest.body, {**manifest.body, "identity": identity}, same)
  _refuse_gaps(store, manifest)
  _record(store, manifest)
  return manifest


def _refuse_gaps(store, manifest):
  gone = missing(store, manifest)
  if gone:
    named = ", ".join(map(str, gone[:5])) + (", ..." if len(gone) > 5 else "")
    raise Incomplete(
      f"the cache in {store.url} is not complete: {len(gone)} of {len(manifest.plan)} shards are missing: {named}."
      " Run the cache stage again: it goes on where it was stopped."
    )


def _record(store, manifest) -> dict[str, Any]:
  data = store.read(COMPLETE)
  if data is None:
    raise Incomplete(
      f"the cache in {store.url} was never read back: it was stopped just before its end. Run the cache stage again."
    )
  record, _ = manifests.unseal(data, f"{store.url}/{COMPLETE}")
  if record["manifest"] != manifest.digest:
    raise CorruptCache(f"{store.url}/{COMPLETE}", "is of another cache")
  return record


def mapped(path: Path) -> mmap.mmap | bytes | None:
  """A file's bytes, mapped into memory; None where there is none."""
  try:
    with open(path, "rb") as file:
      # An empty file cannot be mapped.
      return (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if os.fstat(file.fileno()).st_size
        else b""
      )
  except FileNotFoundError:
    return None
