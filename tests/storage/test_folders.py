"""A folder that a person names is read in one way everywhere; other URLs are rejected."""

from pathlib import Path

import pytest

from distill_jax.storage import folders


@pytest.mark.parametrize(
  "name, expected",
  [
    ("runs/a", "{cwd}/runs/a"),
    ("~/runs", "{home}/runs"),
    ("file:///data/run", "/data/run"),
    ("file:/data/run", "/data/run"),
    ("FILE://localhost/data/my%20run", "/data/my run"),
    (Path("file:///data/run"), "/data/run"),
    ("a:b/c", "{cwd}/a:b/c"),
    ("run [1] ü", "{cwd}/run [1] ü"),
  ],
)
def test_paths_are_absolute(tmp_path, monkeypatch, name, expected):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", "/home/somebody")
  expected = expected.format(cwd=tmp_path, home="/home/somebody")
  assert folders.resolve(name, "folder") == Path(expected)


@pytest.mark.parametrize(
  "name",
  ["s3://bucket/run", Path("s3://bucket/run"), "gs://b/r", "hf://a", "file://host/run"]
  + ["", " ", "a\0b", "~nobody-of-this-name/run"],
)
def test_other_names_are_rejected(name):
  with pytest.raises(ValueError, match=r"^--workdir: "):
    folders.resolve(name, "--workdir")
