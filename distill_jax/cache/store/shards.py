"""Keeps the books of a cache: which shards exist, and that all of them were read back.

A folder holds

    manifest.json       what the cache is; created by the first writer
    ids-DIGEST          ids of the N examples in the order of their rows, int64, little-endian
    shard-00000000 ...  rows in the format of `format`
    head-DIGEST         of a language model's hidden states: the head that turns them into logits
                        (`teacher.lm_head`)
    complete.json       written last, after every shard was read back: the bytes of the shards and
                        the sha256 of all of them in order (`cat shard-* | sha256sum`)

Nothing is locked or appended to. Writers that run at once divide the missing shards among them,
or write the same bytes twice. Both JSON files hold a sha256 of themselves.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.cache.store import manifest as manifests
from distill_jax.cache.store.backend import Store, check_no_pipe
from distill_jax.cache.store.format import pack
from distill_jax.cache.store.manifest import Manifest, Same
from distill_jax.cache.store.records import CorruptCache, Shard

COMPLETE = "complete.json"
Track = Callable[[range], Iterable[int]]


class Incomplete(OSError):
  """A cache that does not exist, or of which a part is missing.

  >>> import tempfile
  >>> from distill_jax import cache
  >>> try:
  ...   cache.open_cache(tempfile.mkdtemp())
  ... except cache.Incomplete:
  ...   print("write_cache makes one")
  write_cache makes one
  """


def begin(store: Store, manifest: Manifest, same: Same | None = None) -> Manifest:
  """Creates a cache, or resumes the existing one.

  Args:
    manifest: of the cache to write.
    same: what counts as equal; None: `==`.

  Returns:
    The manifest to write shards with: this one, or that of an earlier writer, which also chose
    how rows are divided into shards.

  Raises:
    Mismatch: another cache is there; the message names the fields.
    CorruptCache: the existing manifest or its ids were changed.
    StoreError: the store cannot be read or written.
  """
  stored = manifests.load(store)
  if stored is None:
    # The ids are written first, so that a manifest is never without them.
    store.put(manifests.ids_key(manifest.body["ids"]), manifest.ids)
    if store.create(manifests.KEY, manifests.seal(manifest.body, manifest.provenance)):
      return manifest
    stored = manifests.load(store)
    assert stored is not None
  manifests.check_equal(store, stored.body, manifest.body, same)
  return stored


def missing_shards(store: Store, manifest: Manifest) -> list[int]:
  """Returns the numbers of the planned shards that are not stored.

  Raises:
    StoreError: the store cannot be listed.
  """
  present = set(manifest.plan.shard_numbers(store.keys("shard-")))
  return [shard for shard in range(len(manifest.plan)) if shard not in present]


def write_shard(
  store: Store,
  manifest: Manifest,
  shard: int,
  source_crcs: np.ndarray,
  columns: Mapping[str, np.ndarray],
) -> int:
  """Writes one full shard, unless it is already stored.

  Args:
    manifest: from `begin`.
    shard: its number.
    source_crcs: integers [rows], of the examples in the order of the shard's rows.
    columns: arrays [rows, *shape] of the manifest's columns.

  Returns:
    Number of bytes of the shard.

  Raises:
    ValueError: a column has another name, shape or dtype.
    StoreError: the shard cannot be written; earlier shards remain.
  """
  ids, views = manifest.rows.ids_and_views(*manifest.plan.span(shard))
  data = pack(manifest.header(shard), ids, views, source_crcs, columns)
  # A late writer must not replace what others have read back: last bits may differ.
  store.create(manifest.plan.key(shard), data)
  return len(data)


def open_shard(store: Store, manifest: Manifest, shard: int) -> Shard:
  """Maps a local shard into memory, or reads it; its rows are not checked yet.

  Raises:
    Incomplete: it is missing.
    CorruptCache: it is not the expected shard.
    StoreError: it cannot be read.
  """
  key = manifest.plan.key(shard)
  path = store.path(key)
  data = store.read(key) if path is None else map_file(path)
  return parse_shard(store, manifest, shard, data)


def parse_shard(
  store: Store, manifest: Manifest, shard: int, data: bytes | mmap.mmap | None
) -> Shard:
  """Returns the shard in `data`; raises as `open_shard` does, None being a missing shard."""
  if data is None:
    raise Incomplete(
      f"shard {shard} of the cache in {store.url} is missing: run the cache stage again"
    )
  return Shard(data, f"{store.url}/{manifest.plan.key(shard)}", manifest.header(shard))


def complete(store: Store, manifest: Manifest, track: Track = iter) -> dict[str, Any]:
  """Reads every byte of a cache back, checks it and records that the cache is complete.

  A second call is the full check of a cache: it writes nothing, and the record must agree.

  Args:
    manifest: from `begin` or `open_complete`.
    track: wraps the iteration over shard numbers, for instance `tqdm`.

  Returns:
    The record: 'rows', 'bytes', 'sha256', and 'manifest', the manifest's digest.

  Raises:
    Incomplete: shards are missing.
    CorruptCache: a shard or the record was changed; the message names shard and example.
    StoreError: a value cannot be read or written.
  """
  _check_no_gaps(store, manifest)
  sha256 = hashlib.sha256()
  num_bytes = 0
  for number in track(range(len(manifest.plan))):
    shard = open_shard(store, manifest, number)
    shard.check(*manifest.rows.ids_and_views(*manifest.plan.span(number)))
    sha256.update(shard.file_data)
    num_bytes += len(shard.file_data)
  record = {
    "manifest": manifest.digest,
    "rows": len(manifest.rows),
    "bytes": num_bytes,
    "sha256": sha256.hexdigest(),
  }
  is_new = store.create(COMPLETE, manifests.seal(record))
  if not is_new and _read_record(store, manifest) != record:
    raise CorruptCache(
      f"{store.url}/{COMPLETE}", f"does not agree with the shards, which have {record}"
    )
  return record


def open_complete(
  store: Store, identity: Mapping[str, Any] | None = None, same: Same | None = None
) -> Manifest:
  """Returns the manifest of a cache whose shards all exist and were read back when written.

  Args:
    identity: the expected identity; None: any.
    same: what counts as equal; None: `==`.

  Raises:
    Incomplete: there is no cache, shards are missing, or the cache was never read back.
    Mismatch: the identity differs; the message names the fields.
    CorruptCache: manifest or completion record were changed.
    StoreError: the store cannot be read.
  """
  manifest = manifests.load(store)
  if manifest is None:
    raise Incomplete(
      f"cache: expected a cache in {store.url}, got none: write it with "
      "cache.write_cache, or correct the folder"
    )
  if identity is not None:
    expected = {**manifest.body, "identity": identity}
    manifests.check_equal(store, manifest.body, expected, same)
  _check_no_gaps(store, manifest)
  _read_record(store, manifest)
  return manifest


def map_file(path: Path) -> mmap.mmap | bytes | None:
  """Returns a file's bytes, memory-mapped; None without a file."""
  check_no_pipe(path)
  try:
    with open(path, "rb") as file:
      # An empty file cannot be mapped.
      if not os.fstat(file.fileno()).st_size:
        return b""
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except FileNotFoundError:
    return None


def _check_no_gaps(store: Store, manifest: Manifest) -> None:
  missing = missing_shards(store, manifest)
  if missing:
    numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    raise Incomplete(
      f"the cache in {store.url} is incomplete: {len(missing)} of {len(manifest.plan)} shards are "
      f"missing: {numbers}. Run the cache stage again: it resumes where it was stopped."
    )


def _read_record(store: Store, manifest: Manifest) -> dict[str, Any]:
  data = store.read(COMPLETE)
  if data is None:
    raise Incomplete(
      f"{store.url}/{COMPLETE} is missing: the writer was stopped before it had read the cache "
      "back. Run the cache stage again."
    )
  record, _ = manifests.unseal(data, f"{store.url}/{COMPLETE}")
  if record["manifest"] != manifest.digest:
    raise CorruptCache(f"{store.url}/{COMPLETE}", "is of another cache")
  return record
