"""Checks shards as they are read: changed, truncated, renamed and foreign ones raise."""

import json
import mmap
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from distill_jax.cache.store.format import (
  CRC_BYTES,
  MAGIC,
  START,
  VERSION,
  Column,
  Header,
  corrupt_rows,
)


class CorruptCache(OSError):
  """Bytes that must not be used; the message has the location, the reason and the next step.

  Args:
    location: folder and key of the value.
    reason: a predicate, such as "is corrupt: ...".
    delete: what to delete so that the next run writes it again.

  >>> import pathlib, tempfile
  >>> from distill_jax import cache, models
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> folder, source = pathlib.Path(tempfile.mkdtemp()), {"x": np.eye(4, dtype=np.float32)}
  >>> outputs = cache.write_cache(folder, teacher, source, progress=False)
  >>> with open(folder / "shard-00000000", "ab") as shard:
  ...   _ = shard.write(b"?")
  >>> cache.open_cache(folder).check_checksums()  # doctest: +IGNORE_EXCEPTION_DETAIL
  Traceback (most recent call last):
  CorruptCache: .../shard-00000000 is corrupt: it has 321 bytes, expected 320. Delete it ...
  """

  def __init__(self, location: str, reason: str, delete: str = "it"):
    super().__init__(
      f"{location} {reason}. Delete {delete} and run the cache stage again: it writes what is "
      "missing."
    )


class Shard:
  """A shard in memory or mapped into it; the header is checked here, the rows by `check`.

  Args:
    data: all bytes of the shard.
    location: folder and key, for messages.
    expected: the header that the shard must have; None: any.

  Attributes:
    location: as given.
    header: the shard's own.
    file_data: all bytes.
    data: bytes of the records.
    records: the records, a read-only structured array [rows] without a copy; `records['logits']`
      is a column.

  Raises:
    CorruptCache: the header was changed, the size differs, or it is not the expected shard.
  """

  def __init__(self, data: bytes | mmap.mmap, location: str, expected: Header | None = None):
    self.location = location
    self.file_data = memoryview(data).toreadonly()
    self.header = _read_header(self.file_data, location)
    if expected is not None:
      _check_header(self.header, expected, location)
    if len(self.file_data) != self.header.size:
      raise CorruptCache(
        location, f"is corrupt: it has {len(self.file_data):,} bytes, expected {self.header.size:,}"
      )
    self.data = self.file_data[len(self.header.data) :]
    self.records = np.frombuffer(self.data, self.header.record_dtype)

  def check(self, ids: np.ndarray, views: np.ndarray) -> None:
    """Compares every row with its checksum and with the expected example.

    Args:
      ids, views: of all rows, integers [rows].

    Raises:
      CorruptCache: a row was changed or belongs to another example; the message names it.
    """
    corrupt = corrupt_rows(self.data, self.header.record_dtype.itemsize)
    check_records(self.records, ids, views, lambda row: (self.location, row), corrupt)


def check_records(
  records: np.ndarray,
  ids: np.ndarray,
  views: np.ndarray,
  location: Callable[[int], tuple[str, int]],
  corrupt: Sequence[int],
) -> None:
  """Checks that records are unchanged and the requested ones.

  Args:
    records: a structured array [rows].
    ids, views: integers [rows], the requested ones.
    location: index in `records` -> the shard of that record and its row there, for the message.
    corrupt: indices of the records whose checksum differs.

  Raises:
    CorruptCache: the message names shard, row and example.
  """
  equal = (records["id"] == ids) & (records["view"] == views)
  if not corrupt and equal.all():
    return
  at = corrupt[0] if corrupt else int(np.argmin(equal))
  shard, row = location(at)
  example = f"row {row} (example id {ids[at]}, view {views[at]})"
  if corrupt:
    raise CorruptCache(shard, f"is corrupt: {example} has another checksum than when written")
  stored = f"(example id {records['id'][at]}, view {records['view'][at]})"
  raise CorruptCache(shard, f"does not belong here: {example} is another one {stored}")


def _read_header(data: memoryview, location: str) -> Header:
  """Returns the header of a shard after the checks that need no expected header."""
  if len(data) < START or data[:8] != MAGIC:
    raise CorruptCache(
      location, f"is corrupt, or no shard of a cache: expected it to begin with {MAGIC.decode()}"
    )
  version = int.from_bytes(data[8:12], "little")
  if version != VERSION:
    raise CorruptCache(
      location, f"is corrupt, or another program's: format version {version}, expected {VERSION}"
    )
  end = START + int.from_bytes(data[12:16], "little")
  if len(data) < end + CRC_BYTES:
    raise CorruptCache(
      location,
      f"is corrupt: it has {len(data):,} bytes, expected {end + CRC_BYTES:,} for its header",
    )
  if zlib.crc32(data[:end]) != int.from_bytes(data[end : end + CRC_BYTES], "little"):
    raise CorruptCache(location, "is corrupt: its header has another checksum than when written")
  return _parse_header(data, end, location)


def _parse_header(data: memoryview, end: int, location: str) -> Header:
  try:
    members = json.loads(bytes(data[START:end]))
    columns = tuple(
      Column(name, dtype, tuple(shape)) for name, dtype, shape, _ in members["columns"]
    )
    fields = {name: members[name] for name in ("identity", "shard", "first_row", "rows")}
    header = Header(**fields, columns=columns)
    is_canonical = header.members == members and len(header.data) == end + CRC_BYTES
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise CorruptCache(
      location, f"does not follow the format: its header gives {error!r}"
    ) from error
  if not is_canonical:
    raise CorruptCache(location, "does not follow the format: its columns have other offsets")
  return header


def _check_header(header: Header, expected: Header, location: str) -> None:
  """Raises unless this is the expected shard."""
  if header.identity != expected.identity:
    raise CorruptCache(
      location,
      f"is of another cache: its identity is {header.identity!r}, expected {expected.identity!r}",
    )
  for field, value in expected.members.items():
    if header.members[field] != value:
      raise CorruptCache(
        location,
        f"does not belong here: its {field} is {header.members[field]}, expected {value}",
      )
