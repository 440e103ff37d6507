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


@pytest.fixture
def steps_of(tmp_path):
  """A function from lines of text to the steps that are read from them."""

  def steps(lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return [line["step"] for line in sealed_json.read_lines(tmp_path / "metrics.jsonl")]

  return steps


LINES = sealed_json.dump_lines({"step": step} for step in range(9)).split("\n")


def test_lines_are_read_back(steps_of):
  assert steps_of(LINES) == list(range(9))
  appended = sealed_json.dump_lines([{"step": 9}], first=10)
  assert steps_of([*LINES[:9], appended]) == list(range(10))
  assert steps_of([*LINES[:9], appended[:-3]]) == list(range(9))  # torn, as by a kill
  assert steps_of([""]) == []


def test_corrupt_lines_are_named_and_skipped(steps_of):
  lines = list(LINES)
  lines[0] = lines[0].replace("0", "1", 1)
  lines[4] = "\0" * 20
  lines[8] = lines[8].replace("8", "7", 1)
  with pytest.warns(RuntimeWarning, match=r"line 1, 5, 9 of .*metrics.jsonl") as caught:
    assert steps_of(lines) == [1, 2, 3, 5, 6, 7]
  assert len(caught) == 1


@pytest.mark.parametrize(
  "positions, steps, named",
  [
    ([0, 1, 2, 4, 5, 6, 7, 8], [0, 1, 2, 4, 5, 6, 7, 8], "line 4 of .*metrics.jsonl is missing"),
    ([1, 2, 3, 4, 7, 8], [1, 2, 3, 4, 7, 8], "line 1, 6, 7 of .*metrics.jsonl is missing"),
    ([0, 1, 2, 2, 3, 4, 5, 6, 7, 8], list(range(9)), "metrics.jsonl has doubled or moved"),
    ([0, 1, 3, 2, 4, 5, 6, 7, 8], list(range(9)), "metrics.jsonl has doubled or moved"),
  ],
  ids=["removed", "several", "doubled", "swapped"],
)
def test_lines_in_other_numbers_are_named(steps_of, positions, steps, named):
  with pytest.warns(RuntimeWarning, match=named):
    assert steps_of([LINES[position] for position in positions] + [""]) == steps


def test_a_removed_line_next_to_a_corrupt_one_is_named(steps_of):
  lines = [*LINES[:2], *LINES[3:8], "{", ""]
  with pytest.warns(RuntimeWarning) as caught:
    assert steps_of(lines) == [0, 1, 3, 4, 5, 6, 7]
  texts = [str(warning.message) for warning in caught]
  assert [("line 8" in text, "line 3" in text) for text in texts] == [(True, False), (False, True)]


def test_a_line_without_a_number_is_corrupt(steps_of):
  with pytest.warns(RuntimeWarning, match="line 2 of .*line_number: expected an integer"):
    assert steps_of([LINES[0], sealed_json.dumps({"step": 1}), *LINES[2:]]) == [0, *range(2, 9)]
