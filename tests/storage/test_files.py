"""Files are replaced atomically, or not at all."""

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
