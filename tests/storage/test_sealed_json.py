"""Every change of a file with a checksum is found, and named."""

import math
import os
import re

import pytest

from distill_jax.storage import sealed_json

VALUES = {"step": 20, "phase": "validation", "accuracy": 79.11, "rate": 1e-05, "deep": {"a": [1]}}


def flips(content):
  for bit in range(8 * len(content)):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    yield bytes(changed)


@pytest.mark.parametrize("indent", [None, 2])
def test_every_flip_is_found(indent):
  content = sealed_json.dumps(VALUES, indent=indent).encode()
  assert sealed_json.loads(content) == VALUES
  for changed in flips(content):
    with pytest.raises(ValueError):
      sealed_json.loads(changed)


def test_values_come_back():
  values = {"nan": math.nan, "text": "é\udc80", "checksum of": "x", "none": None, "t": (1, 2)}
  read = sealed_json.loads(sealed_json.dumps(values))
  assert math.isnan(read.pop("nan"))
  assert read == {"text": "é\udc80", "checksum of": "x", "none": None, "t": [1, 2]}


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"[]",
    b"3",
    b"null",
    b"{}",
    b'{"step": 3}',
    b'{"step": 3, "checksum": 5}',
    b'{"step": 3, "checksum": null}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe",
    b'{"step": ' + b"9" * 5000 + b"}",
    sealed_json.dumps(VALUES).encode() * 2,
    sealed_json.dumps(VALUES).replace("79.11", "59.11").encode(),
    sealed_json.dumps({}).encode().replace(b"{", b'{"step": 3, '),
  ],
  ids=lambda content: content[:20],
)
def test_file_that_was_not_written_so_is_named(tmp_path, content):
  path = tmp_path / "result.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=re.escape(f"{path} is corrupt")):
    sealed_json.read(path)


def test_pipe_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "result.json")
  for read in (sealed_json.read, sealed_json.read_lines):
    with pytest.raises(ValueError, match="result.json"):
      read(tmp_path / "result.json")


def test_lacking_entry_is_named(tmp_path):
  path = tmp_path / "result.json"
  path.write_text(sealed_json.dumps(VALUES))
  assert sealed_json.read(path, "step", "phase") == VALUES
  with pytest.raises(ValueError, match="result.json .*'seconds'"):
    sealed_json.read(path, "step", "seconds")


def test_corrupt_lines_are_named_and_skipped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [sealed_json.dumps({"step": step}) for step in range(9)]
  path.write_text("\n".join(lines) + "\n")
  assert sealed_json.read_lines(path) == [{"step": step} for step in range(9)]
  lines[0] = lines[0].replace("0", "1", 1)
  lines[4] = "\0" * 20
  path.write_text("\n".join(lines) + '\n{"step": 9, "chec')
  with pytest.warns(RuntimeWarning, match=rf"lines? 1, 5 of {path}"):
    assert [line["step"] for line in sealed_json.read_lines(path)] == [1, 2, 3, 5, 6, 7, 8]
