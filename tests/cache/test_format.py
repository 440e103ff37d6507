"""Compares the bytes of a shard with a reader written from the format's description alone."""

import hashlib
import json
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest

from distill_jax.cache.store import manifest
from distill_jax.cache.store.format import Column, Header, corrupt_rows, pack, valid_crc
from distill_jax.cache.store.records import CorruptCache, Shard

COLUMNS = (
  Column("logits", np.float16, (5,)),
  Column("flag", bool),
  Column("words", "uint32", (2, 3)),
  Column("score", np.float64),
)
ROWS = 7


def header(**changes):
  return Header(
    **(dict(identity="abc", shard=3, first_row=21, rows=ROWS, columns=COLUMNS) | changes)
  )


@pytest.fixture
def data(rng):
  return dict(
    ids=rng.integers(0, 2**40, ROWS),
    views=np.arange(ROWS) % 2,
    source_crcs=rng.integers(0, 2**32, ROWS),
    columns={
      "logits": rng.normal(size=(ROWS, 5)).astype(np.float16),
      "flag": rng.random(ROWS) < 0.5,
      "words": rng.integers(0, 2**32, (ROWS, 2, 3), np.uint32),
      "score": rng.normal(size=ROWS),
    },
  )


def read(raw):
  """Reads a shard by the docstring of `format`, with struct."""
  assert raw[:8] == b"DJXCACHE"
  version, length = struct.unpack_from("<II", raw, 8)
  text = json.loads(raw[16 : 16 + length])
  assert version == 2 and struct.unpack_from("<I", raw, 16 + length)[0] == zlib.crc32(
    raw[: 16 + length]
  )
  start, size = 20 + length, text["record"]
  assert start % 64 == 0 and size % 8 == 0 and len(raw) == start + text["rows"] * size
  rows = []
  for at in range(start, len(raw), size):
    row = dict(zip(("id", "view", "source_crc"), struct.unpack_from("<qiI", raw, at)))
    assert struct.unpack_from("<I", raw, at + size - 4)[0] == zlib.crc32(raw[at : at + size - 4])
    assert zlib.crc32(raw[at : at + size]) == 0x2144DF1C
    used = bytearray(size)
    used[:16], used[-4:] = b"x" * 16, b"x" * 4
    for name, dtype, shape, offset in text["columns"]:
      values = np.frombuffer(raw, dtype, int(np.prod(shape)), at + offset).reshape(shape)
      assert offset % values.itemsize == 0
      used[offset : offset + values.nbytes] = b"x" * values.nbytes
      row[name] = values
    assert not any(byte for byte, taken in zip(raw[at : at + size], used) if not taken)
    rows.append(row)
  return text, rows


def test_another_program_can_read_a_shard(data):
  text, rows = read(pack(header(), **data))
  assert {name: text[name] for name in ("identity", "shard", "first_row", "rows")} == {
    "identity": "abc",
    "shard": 3,
    "first_row": 21,
    "rows": ROWS,
  }
  for number, row in enumerate(rows):
    assert row["id"] == data["ids"][number] and row["view"] == data["views"][number]
    assert row["source_crc"] == data["source_crcs"][number]
    for name, values in data["columns"].items():
      np.testing.assert_array_equal(row[name], values[number])


def test_the_bytes_stay_those_of_version_2():
  """Caches outlive releases: a changed byte requires a new version."""
  columns = (Column("a", "float16", (3,)), Column("b", "uint32"))
  values = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array([7, 8], np.uint32)}
  raw = pack(Header("x", 0, 0, 2, columns), [5, 6], [0, 0], [1, 2], values)
  assert (
    hashlib.sha256(raw).hexdigest()
    == "b87a4022160a41fed6f269a0a2109ca46c659687ee089b99d60415c0b03912f0"
  )


def test_columns_are_views_of_the_bytes(data):
  raw = pack(header(), **data)
  shard = Shard(raw, "here", header())
  shard.check(data["ids"], data["views"])
  for name, values in data["columns"].items():
    np.testing.assert_array_equal(shard.records[name], values)
    assert np.shares_memory(shard.records[name], np.frombuffer(raw, np.uint8))
    assert not shard.records[name].flags.writeable
  np.testing.assert_array_equal(shard.records["source_crc"], data["source_crcs"])


def test_byte_order_and_column_order_do_not_matter(data):
  other = {
    name: x.astype(x.dtype.newbyteorder(">")) for name, x in reversed(list(data["columns"].items()))
  }
  assert pack(header(), **data) == pack(header(), **{**data, "columns": other})
  big_endian = tuple(
    Column(name, np.dtype(dtype).newbyteorder(">"), shape) for name, dtype, shape in COLUMNS
  )
  assert header() == header(columns=big_endian)


def test_flipped_bits_are_noticed(data):
  raw = pack(header(), **data)
  for bit in range(0, 8 * len(raw), 3):
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(CorruptCache, match="^here "):
      Shard(bytes(changed), "here", header()).check(data["ids"], data["views"])


def test_every_other_length_is_noticed(data):
  raw = pack(header(), **data)
  for wrong in [raw[:length] for length in range(len(raw))] + [raw + b"\0", raw + raw]:
    with pytest.raises(CorruptCache, match="^here "):
      Shard(wrong, "here")


def test_corruption_names_row_and_example(data):
  raw = bytearray(pack(header(), **data))
  size = header().record_dtype.itemsize
  raw[len(header().data) + 4 * size] ^= 1  # in the id itself
  with pytest.raises(CorruptCache) as caught:
    Shard(bytes(raw), "folder/shard-3", header()).check(data["ids"], data["views"])
  text = str(caught.value)
  assert text.startswith("folder/shard-3 ") and "Delete it and run" in text
  assert f"row 4 (example id {data['ids'][4]}, view 0)" in text


def test_the_crc_of_valid_rows_depends_on_their_number_only(rng):
  for rows, size in ((1, 24), (7, 24), (5, 4096)):
    bodies = [rng.bytes(size - 4) for _ in range(rows)]
    raw = b"".join(body + zlib.crc32(body).to_bytes(4, "little") for body in bodies)
    assert zlib.crc32(raw) == valid_crc(rows, size) and corrupt_rows(memoryview(raw), size) == []
    wrong = bytearray(raw)
    wrong[-1] ^= 1
    assert corrupt_rows(memoryview(wrong), size) == [rows - 1]


def test_a_row_of_another_example_is_noticed(data):
  shard = Shard(pack(header(), **data), "here", header())
  for field, text in (
    ("ids", f"row 2 (example id {data['ids'][2] + 1}, view 0) is another one"),
    ("views", "view 1)"),
  ):
    wrong = {"ids": data["ids"], "views": data["views"]}
    wrong[field] = wrong[field] + (np.arange(ROWS) == 2)
    with pytest.raises(CorruptCache) as caught:
      shard.check(**wrong)
    assert text in str(caught.value) and f"(example id {data['ids'][2]}, view 0)." in str(
      caught.value
    )


@pytest.mark.parametrize(
  "other, text",
  [
    (dict(identity="another"), "is of another cache: its identity is 'another', expected 'abc'"),
    (dict(shard=4), "does not belong here: its shard is 4, expected 3"),
    (dict(first_row=22), "its first_row is 22, expected 21"),
    (dict(rows=ROWS - 1), f"its rows is {ROWS - 1}, expected {ROWS}"),
    (dict(columns=COLUMNS[:1]), "its columns is [['logits', '<f2', [5], 16]], expected"),
  ],
)
def test_another_shard_is_rejected(other, text):
  other = header(**other)
  zeros = np.zeros(other.rows, int)
  columns = {name: np.zeros((other.rows, *shape), dtype) for name, dtype, shape in other.columns}
  raw = pack(other, zeros, zeros, zeros, columns)
  with pytest.raises(CorruptCache) as caught:
    Shard(raw, "here", header())
  assert text in str(caught.value)


def resealed(raw, text):
  """Returns a file with another header and its correct checksum."""
  length = int.from_bytes(raw[12:16], "little")
  text = text.ljust(length).encode()
  start = raw[:12] + len(text).to_bytes(4, "little") + text
  return start + zlib.crc32(start).to_bytes(4, "little") + raw[20 + length :]


@pytest.mark.parametrize(
  "old, new",
  [
    ('"record": 72', '"record": 80'),
    ('"<f2"', '"<i2"'),
    (", 16]", ", 18]"),
    ('"rows"', '"Rows"'),
    ("{", "["),
  ],
)
def test_a_valid_checksum_of_an_invalid_header_is_rejected(data, old, new):
  raw = pack(header(), **data)
  text = raw[16 : 16 + int.from_bytes(raw[12:16], "little")].decode().rstrip()
  assert Shard(resealed(raw, text), "here", header()).header == header()
  assert old in text
  with pytest.raises(CorruptCache, match="^here "):
    Shard(resealed(raw, text.replace(old, new, 1)), "here", header())


def test_another_version_is_named(data):
  raw = bytearray(pack(header(), **data))
  raw[8] = 3
  with pytest.raises(CorruptCache, match="format version 3, expected 2"):
    Shard(bytes(raw), "here")


@pytest.mark.parametrize(
  "column, text",
  [
    (Column("id", "uint8"), "'id': "),
    (Column("logits", "uint8"), "'logits': "),
    (Column("a", ml_dtypes.bfloat16), "got bfloat16: store its bits as uint16"),
    (Column("a", "complex64"), "expected integers, floats or booleans, got complex64"),
    (Column("a", object), "got object"),
    (Column("a", "uint8", (3, 0)), "expected lengths of at least 1, got shape (3, 0)"),
  ],
)
def test_columns_that_cannot_be_stored_are_rejected(column, text):
  with pytest.raises(ValueError) as caught:
    header(columns=(*COLUMNS, column))
  assert text in str(caught.value)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(ids=np.zeros(ROWS - 1, int)), f"'id': expected shape ({ROWS},), got ({ROWS - 1},)"),
    (dict(ids=np.full(ROWS, 2**63, np.uint64)), "'id': expected int64, got 9223372036854775808"),
    (dict(views=np.full(ROWS, 2**31)), "'view': expected int32, got 2147483648"),
    (dict(source_crcs=np.full(ROWS, -1)), "'source_crc': expected uint32, got -1"),
    (dict(flag=np.zeros((ROWS, 1), bool)), f"'flag': expected shape ({ROWS},), got ({ROWS}, 1)"),
    (dict(logits=np.zeros((ROWS, 5), np.float32)), "'logits': expected float16, got float32"),
    (
      dict(logits=None),
      "columns: expected ['logits', 'flag', 'words', 'score'], got ['flag', 'words', 'score']",
    ),
    (dict(more=np.zeros(ROWS)), "got ['logits', 'flag', 'words', 'score', 'more']"),
  ],
)
def test_rows_that_do_not_fit_are_rejected(data, change, text):
  fixed = {name: change.pop(name) for name in list(change) if name in data}
  columns = {name: x for name, x in {**data["columns"], **change}.items() if x is not None}
  with pytest.raises(ValueError) as caught:
    pack(header(), **{**data, "columns": columns, **fixed})
  assert text in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"body":' * 100_000, b"[]", b"\xff"])
def test_manifest_of_many_levels_or_another_type_is_corrupt(content):
  with pytest.raises(CorruptCache, match="manifest.json"):
    manifest.unseal(content, "cache/manifest.json")
