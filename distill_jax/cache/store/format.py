"""Defines the file format of a shard: a header, then records of one size, all under checksums.

A shard is one file, or one object of a store. All numbers are little-endian; crc32 is zlib's.

    offset      bytes
    0           8         "DJXCACHE"
    8           4         format version, uint32: 2
    12          4         L, length of the text that follows, uint32
    16          L         the header, a JSON object in ASCII, padded with spaces
    16 + L      4         uint32: crc32 of bytes 0 to 15 + L
    20 + L      R x S     R records of S bytes; 20 + L is a multiple of 64; nothing follows

Members of the header:

    identity    text: digest of the cache that this shard is a part of
    shard       its number, from 0
    first_row   number of its first row in the full cache
    rows        R
    columns     list of [name, dtype as NumPy writes it ("<f2", "|u1"), shape of one row, offset in
                the record]
    record      S

A record holds, in addition to its columns:

    0           8         id of the example, int64
    8           4         view: number of the example's augmentation, int32
    12          4         source_crc: a checksum of the example that the teacher received, uint32
    S - 4       4         crc: crc32 of the record's bytes 0 to S - 5, uint32; so the crc32 of the
                          full record is 0x2144DF1C

Columns are stored in the order of the list from byte 16 on, each at the next multiple of its
item's size; S is the least multiple of 8 that holds them and the crc; bytes between are 0. A row
is contiguous, so that a random row costs one page, one copy and one checksum.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"DJXCACHE"
VERSION = 2
START = 16  # bytes before the header's text
CRC_BYTES = 4
RESIDUE = 0x2144DF1C  # crc32 of any bytes followed by their own crc32
_RESERVED = ("id", "view", "source_crc", "crc")
_ALIGNMENT = 64


class Column(NamedTuple):
  """One array per row.

  Attributes:
    name: none of 'id', 'view', 'source_crc' and 'crc'.
    dtype: NumPy integers, floats or booleans; bfloat16 is stored as the uint16 of its bits.
    shape: of one row.
  """

  name: str
  dtype: Any
  shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Header:
  """The header of a shard.

  Attributes:
    identity: digest of the cache that the shard is a part of.
    shard: its number.
    first_row: number of its first row in the full cache.
    rows: number of records.
    columns: of each record.

  Raises:
    ValueError: a column's name is taken, or its dtype or shape cannot be stored.
  """

  identity: str
  shard: int
  first_row: int
  rows: int
  columns: tuple[Column, ...]

  def __post_init__(self):
    object.__setattr__(self, "columns", normalize_columns(self.columns))

  @property
  def record_dtype(self) -> np.dtype:
    """The structured dtype of a record."""
    return _record_dtype(self.columns)

  @property
  def size(self) -> int:
    """Number of bytes of the full shard."""
    return len(self.data) + self.rows * self.record_dtype.itemsize

  @functools.cached_property
  def members(self) -> dict[str, Any]:
    """The JSON object."""
    fields: Mapping[str, Any] = self.record_dtype.fields or {}
    columns = [[name, dtype, list(shape), fields[name][1]] for name, dtype, shape in self.columns]
    return dataclasses.asdict(self) | {"columns": columns, "record": self.record_dtype.itemsize}

  @functools.cached_property
  def data(self) -> bytes:
    """The bytes before the first record."""
    text = json.dumps(self.members).encode()
    text += b" " * (-(START + len(text) + CRC_BYTES) % _ALIGNMENT)
    start = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    return start + zlib.crc32(start).to_bytes(CRC_BYTES, "little")


def normalize_columns(columns: Iterable[Column]) -> tuple[Column, ...]:
  """Returns the columns with dtypes as the format writes them.

  Raises:
    ValueError: a column's name is taken, or its dtype or shape cannot be stored.
  """
  normalized: list[Column] = []
  for name, dtype, shape in columns:
    taken = (*_RESERVED, *(column.name for column in normalized))
    if name in taken:
      raise ValueError(f"column {name!r}: expected a new name, got one of {sorted(taken)}")
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype.kind not in "biuf":
      hint = ": store its bits as uint16" if dtype.name == "bfloat16" else ""
      raise ValueError(
        f"column {name!r}: expected integers, floats or booleans, got {dtype.name}{hint}"
      )
    if not all(length > 0 for length in shape):
      raise ValueError(f"column {name!r}: expected lengths of at least 1, got shape {tuple(shape)}")
    normalized.append(Column(name, dtype.str, tuple(map(int, shape))))
  return tuple(normalized)


def pack(
  header: Header,
  ids: np.ndarray,
  views: np.ndarray,
  source_crcs: np.ndarray,
  columns: Mapping[str, np.ndarray],
) -> bytes:
  """Returns a shard's bytes; the same rows give the same bytes.

  Args:
    header: its `rows` is the number of rows R.
    ids, views, source_crcs: integers [R].
    columns: arrays [R, *shape] of the header's names and dtypes.

  Raises:
    ValueError: a column is missing or unknown, has another shape or dtype, or a number does not
      fit.
  """
  names = [column.name for column in header.columns]
  if set(columns) != set(names):
    raise ValueError(f"columns: expected {names}, got {list(columns)}")
  records = np.zeros(header.rows, header.record_dtype)
  for name, values in {"id": ids, "view": views, "source_crc": source_crcs}.items():
    _fill_integers(name, records[name], np.asarray(values))
  for name, values in columns.items():
    _fill_column(name, records[name], np.asarray(values))
  rows = records.view(np.uint8).reshape(header.rows, -1)
  records["crc"] = np.fromiter(map(zlib.crc32, rows[:, :-CRC_BYTES]), np.uint32, header.rows)
  return b"".join((header.data, rows.data))


def corrupt_rows(data: memoryview, size: int) -> list[int]:
  """Returns the indices of records that are not as they were written.

  Args:
    data: bytes of the records in order.
    size: bytes of a record.
  """
  rows = len(data) // size
  if zlib.crc32(data) == valid_crc(rows, size):
    return []
  return [row for row in range(rows) if zlib.crc32(data[row * size : (row + 1) * size]) != RESIDUE]


@functools.lru_cache
def valid_crc(rows: int, size: int) -> int:
  """Returns the crc32 of so many valid records of one size.

  It does not depend on their contents, because the crc32 of each is `RESIDUE`.
  """
  record = bytes(size - CRC_BYTES)
  return zlib.crc32((record + zlib.crc32(record).to_bytes(CRC_BYTES, "little")) * rows)


@functools.lru_cache
def _record_dtype(columns: tuple[Column, ...]) -> np.dtype:
  formats: list[Any] = ["<i8", "<i4", "<u4"]
  offsets = [0, 8, 12]
  end = 16
  for _, dtype, shape in columns:
    item = np.dtype((dtype, shape))
    offsets.append(-(-end // item.base.itemsize) * item.base.itemsize)
    formats.append(item)
    end = offsets[-1] + item.itemsize
  size = -(-(end + CRC_BYTES) // 8) * 8
  return np.dtype(
    {
      "names": [*_RESERVED[:3], *(column.name for column in columns), "crc"],
      "formats": [*formats, "<u4"],
      "offsets": [*offsets, size - CRC_BYTES],
      "itemsize": size,
    }
  )


def _fill_integers(name: str, target: np.ndarray, values: np.ndarray) -> None:
  _check_shape(name, target, values)
  target[:] = values
  if not (target == values).all():
    value = values[np.flatnonzero(target != values)[0]]
    raise ValueError(f"column {name!r}: expected {target.dtype.name}, got {value}, which overflows")


def _fill_column(name: str, target: np.ndarray, values: np.ndarray) -> None:
  _check_shape(name, target, values)
  if values.dtype.newbyteorder("<") != target.dtype:
    raise ValueError(f"column {name!r}: expected {target.dtype.name}, got {values.dtype.name}")
  target[:] = values


def _check_shape(name: str, target: np.ndarray, values: np.ndarray) -> None:
  if values.shape != target.shape:
    raise ValueError(f"column {name!r}: expected shape {target.shape}, got {values.shape}")
