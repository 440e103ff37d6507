"""Shards as they are read: nothing that was changed, cut, renamed or mixed up gets through."""

import json
import mmap
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from distill_jax.cache.store.format import CRC, MAGIC, START, VERSION, Column, Header, changed


class CorruptCache(OSError):
  """What was read must not be used; the text says where, why, and what to do.

  Args:
    where: folder and key of the value.
    text: what is wrong with it.
    delete: what to delete so that it is written anew.
  """

  def __init__(self, where: str, text: str, delete: str = "it"):
    super().__init__(
      f"{where} {text}. Delete {delete} and run the cache stage again: it writes what is missing."
    )


class Shard:
  """A shard that was read or mapped into memory; its header is checked here, its rows by `check`.

  Attributes:
    where: folder and key.
    header: what it says of itself.
    data: all its bytes.
    raw: the records' bytes.
    records: the records, a read-only structured array [rows] that copies nothing; `records['logits']` is a column.

  Raises:
    CorruptCache: the header was changed, bytes are missing or too many, or it is not the shard that was expected.
  """

  def __init__(self, data: bytes | mmap.mmap, where: str, expected: Header | None = None):
    view = memoryview(data).toreadonly()
    self.where, self.header, self.data = where, _read_header(view, where), view
    if expected is not None:
      _check_header(self.header, expected, where)
    if len(view) != self.header.size:
      raise CorruptCache(
        where, f"is damaged: it has {len(view):,} bytes, expected {self.header.size:,}"
      )
    self.raw = view[len(self.header.encoded) :]
    self.records = np.frombuffer(self.raw, self.header.record)

  def check(self, ids: np.ndarray, views: np.ndarray) -> None:
    """Compare every row with its checksum and with what should be there.

    Args:
      ids, views: of all rows, integers [rows].

    Raises:
      CorruptCache: a row was changed or is another one's; the example is named.
    """
    wrong = changed(self.raw, self.header.record.itemsize)
    check_records(self.records, ids, views, lambda row: (self.where, row), wrong)


def check_records(
  records: np.ndarray,
  ids: np.ndarray,
  views: np.ndarray,
  place: Callable[[int], tuple[str, int]],
  wrong: Sequence[int],
) -> None:
  """Refuse records that were changed, or are not those that were asked for.

  Args:
    records: a structured array [rows].
    ids, views: integers [rows].
    place: for the message, the shard that a record came from and its row there.
    wrong: those of `records` that were changed.

  Raises:
    CorruptCache: shard, row and example are named.
  """
  right = (records["id"] == ids) & (records["view"] == views)
  if not wrong and right.all():
    return
  at = wrong[0] if wrong else int(np.argmin(right))
  where, row = place(at)
  what = f"row {row} (example id {ids[at]}, view {views[at]})"
  if wrong:
    raise CorruptCache(where, f"is damaged: {what} has another checksum than when it was written")
  held = f"(example id {records['id'][at]}, view {records['view'][at]})"
  raise CorruptCache(where, f"does not belong here: {what} is another one {held}")


def _read_header(data: memoryview, where: str) -> Header:
  if len(data) < START or data[:8] != MAGIC:
    raise CorruptCache(
      where, f"is damaged, or no shard of a cache: it does not begin with {MAGIC.decode()}"
    )
  version, length = (int.from_bytes(data[at : at + 4], "little") for at in (8, 12))
  if version != VERSION:
    raise CorruptCache(
      where, f"is damaged, or another program's: format version {version}, expected {VERSION}"
    )
  end = START + length
  if len(data) < end + CRC:
    raise CorruptCache(
      where, f"is damaged: it has {len(data):,} bytes, its header alone {end + CRC:,}"
    )
  if zlib.crc32(data[:end]) != int.from_bytes(data[end : end + CRC], "little"):
    raise CorruptCache(
      where, "is damaged: its header has another checksum than when it was written"
    )
  try:
    members = json.loads(bytes(data[START:end]))
    columns = tuple(
      Column(name, dtype, tuple(shape)) for name, dtype, shape, _ in members["columns"]
    )
    plain = {name: members[name] for name in ("identity", "shard", "first_row", "rows")}
    header = Header(**plain, columns=columns)
    same = header.members == members and len(header.encoded) == end + CRC
  except (ValueError, KeyError, TypeError) as error:
    raise CorruptCache(
      where, f"is not written as the format has it: its header gives {error!r}"
    ) from error
  if not same:
    raise CorruptCache(
      where, "is not written as the format has it: its columns should lie elsewhere"
    )
  return header


def _check_header(found: Header, expected: Header, where: str) -> None:
  """Tell the shard that should be here from every other."""
  if found.identity != expected.identity:
    raise CorruptCache(
      where,
      f"is of another cache: its identity is {found.identity!r}, expected {expected.identity!r}",
    )
  for field, value in expected.members.items():
    if found.members[field] != value:
      raise CorruptCache(
        where, f"does not belong here: its {field} is {found.members[field]}, expected {value}"
      )
