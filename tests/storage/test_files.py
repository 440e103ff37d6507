"""Files are replaced atomically, or not at all."""

import errno
import os

import pytest

from distill_jax.storage import files


def test_text_and_bytes_replace_the_old_content(tmp_path):
  path = tmp_path / "result.json"
  for content, expected in (("größer\n", "größer\n".encode()), (b"\x00\xff", b"\x00\xff")):
    files.write(path, content)
    assert path.read_bytes() == expected
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_killed_during_write_keeps_the_old_file(tmp_path, monkeypatch, broken):
  path = tmp_path / "result.json"
  files.write(path, "old")

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, broken, killed)
  with pytest.raises(KeyboardInterrupt):
    files.write(path, "new")
  assert path.read_text() == "old"


def full_disk(*args):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
  path = tmp_path / "result.json"
  files.write(path, "old")
  monkeypatch.setattr(os, "fsync", full_disk)
  with pytest.raises(OSError, match="result.json") as raised:
    files.write(path, "new")
  assert raised.value.errno == errno.ENOSPC
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  ("error", "is_full"),
  [
    (OSError(errno.ENOSPC, "x"), True),
    (OSError(errno.EDQUOT, "x"), True),
    # Recorded: TensorStore's, through Orbax.
    (ValueError('RESOURCE_EXHAUSTED: Failed writing: "/a": No space left on device [28]'), True),
    (OSError(errno.EACCES, "x"), False),
    (ValueError("RESOURCE_EXHAUSTED: Out of memory"), False),
  ],
)
def test_errors_of_a_full_disk(tmp_path, error, is_full):
  outer = RuntimeError("checkpoint 3 was not written")
  outer.__cause__ = error
  assert files.is_disk_full(outer) == is_full
  assert ("5,000" in files.missing_space(outer, tmp_path, 5000)) == is_full
