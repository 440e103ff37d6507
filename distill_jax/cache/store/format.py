"""The file format of a shard: a header, then records of one size, every bit of them under a checksum.

A shard is one file, or one object of a store. All numbers are little-endian; crc32 is zlib's.

    offset      bytes
    0           8         "DJXCACHE"
    8           4         format version, uint32: 1
    12          4         L, length of the text that follows, uint32
    16          L         the header, a JSON object in ASCII, filled up with spaces
    16 + L      4         uint32: crc32 of bytes 0 to 15 + L
    20 + L      R x S     R records of S bytes; 20 + L is a multiple of 64; nothing follows

Members of the header:

    identity    text: what this shard is a part of
    shard       its number, from 0
    first_row   number of its first row in the whole cache
    rows        R
    columns     list of [name, dtype as numpy writes it ("<f2", "|u1"), shape of one row, offset in the record]
    record      S

A record holds, beside its columns:

    0           8         id: of the example, int64
    8           4         view: which augmentation of the example, int32
    12          4         source_crc: a checksum of the example that the teacher was given, uint32
    S - 4       4         crc: crc32 of the record's bytes 0 to S - 5, uint32; so the whole record's is 0x2144DF1C

Columns lie in the order of the list from byte 16 on, each at the next multiple of its item's size; S is the least
multiple of 8 that holds them and the crc; bytes between are 0. All of a row lies together, so that a row
at random costs one page, one copy and one checksum.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

MAGIC, VERSION = b"DJXCACHE", 1
_RESERVED = ("id", "view", "source_crc", "crc")
START, CRC = 16, 4  # bytes before the header's text, and of a checksum
RESIDUE = 0x2144DF1C  # crc32 of anything followed by its own crc32
_ALIGNMENT = 64


class Column(NamedTuple):
  """What each row holds under one name.

  Attributes:
    name: none of 'id', 'view', 'source_crc' and 'crc'.
    dtype: integers, floats or booleans as numpy has them; bfloat16 is stored as the uint16 of its bits.
    shape: of one row.
  """

  name: str
  dtype: Any
  shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Header:
  """What a shard says of itself.

  Attributes:
    identity: what it is a part of.
    shard: its number.
    first_row: in the whole cache.
    rows: how many records follow.
    columns: what they hold.

  Raises:
    ValueError: a column's name is taken, or its dtype or shape cannot be stored.
  """

  identity: str
  shard: int
  first_row: int
  rows: int
  columns: tuple[Column, ...]

  def __post_init__(self):
    object.__setattr__(self, "columns", normal_columns(self.columns))

  @property
  def record(self) -> np.dtype:
    """The structured dtype of a record."""
    return _record(self.columns)

  @property
  def size(self) -> int:
    """Bytes of the whole shard."""
    return len(self.encoded) + self.rows * self.record.itemsize

  @functools.cached_property
  def members(self) -> dict[str, Any]:
    """The JSON object."""
    fields: Mapping[str, Any] = self.record.fields or {}
    places = [[name, dtype, list(shape), fields[name][1]] for name, dtype, shape in self.columns]
    return dataclasses.asdict(self) | {"columns": places, "record": self.record.itemsize}

  @functools.cached_property
  def encoded(self) -> bytes:
    """The bytes before the first record."""
    text = json.dumps(self.members).encode()
    text += b" " * (-(START + len(text) + CRC) % _ALIGNMENT)
    start = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    return start + zlib.crc32(start).to_bytes(CRC, "little")


def normal_columns(columns: Iterable[Column]) -> tuple[Column, ...]:
  """The columns with dtypes as the format writes them.

  Raises:
    ValueError: a column's name is taken, or its dtype or shape cannot be stored.
  """
  normal: list[Column] = []
  for name, dtype, shape in columns:
    dtype, taken = (
      np.dtype(dtype).newbyteorder("<"),
      (*_RESERVED, *(column.name for column in normal)),
    )
    if name in taken:
      raise ValueError(f"column {name!r}: the name is taken; there are {sorted(taken)}")
    if dtype.kind not in "biuf":
      hint = "; store its bits as uint16" if dtype.name == "bfloat16" else ""
      raise ValueError(
        f"column {name!r}: expected integers, floats or booleans, got {dtype.name}{hint}"
      )
    if not all(length > 0 for length in shape):
      raise ValueError(f"column {name!r}: expected lengths of at least 1, got shape {tuple(shape)}")
    normal.append(Column(name, dtype.str, tuple(map(int, shape))))
  return tuple(normal)


@functools.lru_cache
def _record(columns: tuple[Column, ...]) -> np.dtype:
  formats: list[Any] = ["<i8", "<i4", "<u4"]
  offsets, end = [0, 8, 12], 16
  for _, dtype, shape in columns:
    item = np.dtype((dtype, shape))
    offsets.append(-(-end // item.base.itemsize) * item.base.itemsize)
    formats.append(item)
    end = offsets[-1] + item.itemsize
  size = -(-(end + CRC) // 8) * 8
  names = [*_RESERVED[:3], *(column.name for column in columns), "crc"]
  return np.dtype(
    {
      "names": names,
      "formats": [*formats, "<u4"],
      "offsets": [*offsets, size - CRC],
      "itemsize": size,
    }
  )


def pack(header: Header, ids, views, source_crcs, columns: Mapping[str, np.ndarray]) -> bytes:
  """A shard's bytes; the same rows give the same bytes.

  Args:
    header: its `rows` is the number of rows R here.
    ids, views, source_crcs: integers [R].
    columns: arrays [R, *shape] of the header's names and dtypes.

  Raises:
    ValueError: a column is missing or unknown, has another shape or dtype, or a number does not fit.
  """
  if set(columns) != {column.name for column in header.columns}:
    raise ValueError(
      f"columns: expected {[column.name for column in header.columns]}, got {list(columns)}"
    )
  records = np.zeros(header.rows, header.record)
  for name, values in {"id": ids, "view": views, "source_crc": source_crcs, **columns}.items():
    values, target = np.asarray(values), records[name]
    if values.shape != target.shape:
      raise ValueError(f"column {name!r}: expected shape {target.shape}, got {values.shape}")
    if name in columns and values.dtype.newbyteorder("<") != target.dtype:
      raise ValueError(f"column {name!r}: expected {target.dtype.name}, got {values.dtype.name}")
    target[:] = values
    if name not in columns and not (target == values).all():
      wrong = values[np.flatnonzero(target != values)[0]]
      raise ValueError(f"column {name!r}: {wrong} does not fit {target.dtype.name}")
  rows = records.view(np.uint8).reshape(header.rows, -1)
  records["crc"] = np.fromiter(map(zlib.crc32, rows[:, :-CRC]), np.uint32, header.rows)
  return b"".join((header.encoded, rows.data))


def changed(raw: memoryview, size: int) -> list[int]:
  """Which of these records of one size are not as they were written.

  Args:
    raw: all bytes of the records, one after the other.
    size: of a record.
  """
  rows = len(raw) // size
  if zlib.crc32(raw) == unchanged(rows, size):
    return []
  return [row for row in range(rows) if zlib.crc32(raw[row * size : (row + 1) * size]) != RESIDUE]


@functools.lru_cache
def unchanged(rows: int, size: int) -> int:
  """crc32 of so many records of one size: whatever they hold, because each one's own is `RESIDUE`."""
  record = bytes(size - CRC)
  return zlib.crc32((record + zlib.crc32(record).to_bytes(CRC, "little")) * rows)
