"""A folder that a person names is read in one way everywhere; other URLs are rejected."""

from pathlib import Path

import pytest

from distill_jax.cache.store.backend import open_store
from distill_jax.compression.sizes import disk_bytes
from distill_jax.data import text
from distill_jax.data.sets import folder as image_folder
from distill_jax.jobs import cli
from distill_jax.jobs.overrides import config_file
from distill_jax.models.weights import load_weights
from distill_jax.report import __main__ as report
from distill_jax.storage import folders
from distill_jax.storage.lease import Lease
from distill_jax.storage.stablehlo import load_stablehlo
from distill_jax.storage.student import export_student, load_student
from distill_jax.train import CheckpointOptions
from distill_jax.types import Variables

READERS = [
  lambda path: load_student(path, None),
  load_stablehlo,
  lambda path: load_weights(path, Variables({}, {})),
  disk_bytes,
  text.bpe,
  lambda path: text.train_bpe(path, size=300),
  lambda path: text.load(path, length=8),
  image_folder.images,
]
"""Calls that read a folder or a file."""


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
  monkeypatch.setenv("HOME", "/somewhere/else")
  expected = expected.format(cwd=tmp_path, home="/somewhere/else")
  assert folders.resolve(name, "folder") == Path(expected)


@pytest.mark.parametrize(
  "name",
  ["s3://bucket/run", Path("s3://bucket/run"), "gs://b/r", "hf://a", "file://host/run"]
  + ["", " ", "a\0b", "a\\b", "~nobody-of-this-name/run"],
)
def test_other_names_are_rejected(name):
  with pytest.raises(ValueError, match=r"^--workdir: "):
    folders.resolve(name, "--workdir")


def test_run_folders_have_no_brackets(tmp_path, monkeypatch):
  for name in ("run [1]", "file:///data/[a]"):
    assert folders.resolve(name, "folder")
    with pytest.raises(ValueError, match=r"^--workdir: .*\["):
      folders.resolve_run(name, "--workdir")
  (tmp_path / "a[1]").mkdir()
  monkeypatch.chdir(tmp_path / "a[1]")
  with pytest.raises(ValueError, match="^checkpoints: "):
    CheckpointOptions("run")


@pytest.mark.parametrize(
  "main, arguments, field",
  [
    (cli.main, ["--config=absent.py", "--workdir=s3://b/run"], "--workdir"),
    (cli.main, ["--config=absent.py", "--workdir=a[1]"], "--workdir"),
    (report.main, ["run", "--out=gs://b/page"], "--out"),
    (report.main, ["s3://b/run", "--out=page"], "RUN"),
  ],
)
def test_commands_reject_such_folders_at_once(tmp_path, monkeypatch, main, arguments, field):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=f"^{field}: "):
    main(arguments)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "call",
  [
    lambda name: export_student(Variables({}, {}), name, description={}),
    lambda name: open_store(name.replace("s3://", "a\\")),
    lambda name: Lease(name),
    *READERS,
  ],
)
def test_calls_reject_such_folders(tmp_path, monkeypatch, call):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="^(folder|path|cache|source|network): expected a"):
    call("s3://bucket")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", READERS)
@pytest.mark.parametrize("name", ["~/a [1] ü.npz", "file://{home}/a%20[1] ü.npz", "a [1] ü.npz"])
def test_calls_read_what_is_named(tmp_path, monkeypatch, call, name):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises((OSError, ValueError)) as error:
    call(name.format(home=tmp_path))
  assert str(tmp_path) in str(error.value) and "a [1] ü.npz" in str(error.value)


def test_config_may_be_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert config_file("~/job.py") == tmp_path / "job.py"
