"""Checks named values in folders, in memory and on a server that speaks S3."""

import concurrent.futures
import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

from distill_jax.cache.store.backend import StoreError, open_store
from distill_jax.cache.store.shards import map_file


@pytest.fixture
def read_only(tmp_path):
  """A folder with a value that this process may read but not write."""
  folder = Path(tempfile.mkdtemp())  # others can reach it, unlike pytest's own
  folder.chmod(0o755)
  open_store(folder).put("old", b"1")
  for file in folder.iterdir():
    file.chmod(0o644)
  if os.geteuid() == 0:
    os.seteuid(65534)  # permission bits do not bind root
    yield folder
    os.seteuid(0)
  else:
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
  shutil.rmtree(folder)


def test_values_are_read_back(url):
  store = open_store(url)
  assert store.read("a") is None and store.keys() == []
  for key, value in {"shard-1": b"one", "shard-2": bytes(100_000), "other": b""}.items():
    store.put(key, value)
    assert open_store(url).read(key) == value
  store.put("shard-1", b"two")
  assert store.read("shard-1") == b"two"
  assert store.keys() == ["other", "shard-1", "shard-2"]
  assert store.keys("shard-") == ["shard-1", "shard-2"]
  assert store.keys("z") == []


def test_create_has_one_winner_of_sixteen(url):
  values = [b"%d" % n for n in range(16)]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    won = list(pool.map(lambda value: open_store(url).create("manifest", value), values))
  assert sum(won) == 1
  assert open_store(url).read("manifest") == values[won.index(True)]
  assert not open_store(url).create("manifest", b"late")


def test_a_probe_leaves_nothing(url):
  store = open_store(url)
  store.probe_writable(nbytes=1)
  assert store.keys() == []


def test_only_local_values_have_a_path(url):
  store = open_store(url)
  store.put("a", b"1")
  path = store.path("a")
  assert path is None if url.startswith(("memory", "s3")) else path.read_bytes() == b"1"


def test_names_are_plain_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  for url, file in {
    "a/b": "a/b/key",
    "~/c": "home/c/key",
    f"file://{tmp_path}/d%20e": "d e/key",
    "50%25 #1?": "50%25 #1?/key",
  }.items():
    store = open_store(url)
    store.put("key", b"1")
    assert store.folder.is_absolute() and (tmp_path / file).read_bytes() == b"1"


def test_unfinished_files_are_never_listed(url, tmp_path):
  """A killed write leaves such files, also where its folder was copied to a bucket."""
  store = open_store(url)
  store.put("shard-0", b"1")
  if store.folder is not None:
    (store.folder / "shard-1.__lock").write_bytes(b"half")
  else:
    store.kv.write("shard-1.__lock", b"half").result()
  assert store.keys() == ["shard-0"] and store.read("shard-1") is None
  assert store.create("shard-1", b"whole") and store.read("shard-1") == b"whole"


@pytest.mark.parametrize(
  "url, text",
  [
    (
      "http://host/x",
      "expected a local path or one of file://, gs://, memory://, s3://; got http:/...",
    ),
    ("gs:/bucket/x", "got gs:/..."),
    ("zip://x", "got zip:/..."),
    (
      "s3://bucket/x?endpont=http://host",
      "'endpont'; did you mean 'endpoint'?",
    ),
    ("s3://bucket/x?region=", "option 'region', got"),
    ("s3://bucket/x?region=a&region=b", "option 'region', got"),
    ("gs://bucket/x?endpoint=http://host", "gs://, got 'endpoint'"),
    ("gs://bucket/x#y", "no fragment"),
    ("file://folder/x", "file:///folder; got file://folder/x"),
  ],
)
def test_other_urls_are_rejected(url, text):
  with pytest.raises(ValueError) as caught:
    open_store(url)
  assert text in str(caught.value)


def test_a_password_is_rejected_and_not_repeated():
  with pytest.raises(ValueError, match="password") as caught:
    open_store("s3://user:secret@bucket/x")
  assert "secret" not in str(caught.value)


def test_the_url_sets_bucket_path_and_options():
  spec = open_store("gs://my-bucket/a/b").kv.spec().to_json()
  assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "my-bucket", "a/b/")
  spec = (
    open_store("s3://my-bucket/?region=eu-central-1&endpoint=https%3A%2F%2Fhost")
    .kv.spec()
    .to_json()
  )
  assert (spec["driver"], spec["bucket"], spec.get("path", "")) == ("s3", "my-bucket", "")
  assert (spec["aws_region"], spec["endpoint"]) == ("eu-central-1", "https://host")
  with pytest.raises(StoreError, match="cannot open gs://My Bucket/: .*bucket name"):
    open_store("gs://My Bucket")


def test_a_read_only_folder_is_noticed_early(read_only):
  store = open_store(read_only)
  assert store.read("old") == b"1"
  for attempt in (
    store.probe_writable,
    lambda: store.put("new", b""),
    lambda: store.create("new", b""),
  ):
    with pytest.raises(StoreError, match=f"to {read_only}: Permission denied") as caught:
      attempt()
    assert caught.value.errno == errno.EACCES
  assert store.keys() == ["old"]


def test_an_unreadable_value_is_named(read_only):
  os.seteuid(os.getuid())
  (read_only / "old").chmod(0)
  if os.getuid() == 0:
    os.seteuid(65534)
  with pytest.raises(StoreError, match=f"cannot read 'old' from {read_only}: Permission denied"):
    open_store(read_only).read("old")


def test_a_file_in_the_way_is_named(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(StoreError, match=f"cannot write to {tmp_path}/file: Not a directory"):
    open_store(tmp_path / "file").probe_writable()


def test_a_pipe_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "manifest.json")
  with pytest.raises(StoreError, match="manifest.json"):
    open_store(tmp_path).read("manifest.json")
  with pytest.raises(StoreError, match="manifest.json"):
    map_file(tmp_path / "manifest.json")


def test_a_disk_with_too_little_room_is_noticed_early(tmp_path):
  with pytest.raises(StoreError, match="cannot write 1,000,000,000,000,000 bytes") as caught:
    open_store(tmp_path / "cache").probe_writable(nbytes=10**15)
  assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def small_files():
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_value(tmp_path, small_files):
  store = open_store(tmp_path)
  store.put("shard-0", b"1")
  for attempt in (store.put, store.create):
    with pytest.raises(
      StoreError, match=f"cannot write 'shard-1' to {tmp_path}: File too large"
    ) as caught:
      attempt("shard-1", bytes(100_000))
    assert caught.value.errno == errno.EFBIG
  with pytest.raises(StoreError):
    store.put("shard-0", bytes(100_000))
  assert store.read("shard-0") == b"1" and store.keys() == ["shard-0"]
  store.put("shard-1", b"2")
  assert store.keys() == ["shard-0", "shard-1"]


def test_a_bucket_that_does_not_exist_is_named(server):
  store = open_store(f"s3://no-such-bucket/x?endpoint={server}&region=us-east-1")
  for attempt in (store.probe_writable, store.keys, lambda: store.put("a", b"")):
    with pytest.raises(StoreError, match="s3://no-such-bucket/x.*specified bucket does not exist$"):
      attempt()


def test_a_server_that_does_not_answer_is_named_before_and_after_the_wait(monkeypatch, capfd):
  backend = "distill_jax.cache.store.backend"
  monkeypatch.setattr(f"{backend}._RETRIES", {"max_retries": 1, "initial_delay": "100ms"})
  monkeypatch.setattr(f"{backend}._SILENT_SECONDS", 0.01)
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
  store = open_store("s3://bucket/x?endpoint=http://127.0.0.1:9&region=us-east-1")
  for _ in range(2):
    error = "cannot read 'a' from s3://bucket/x: .*connect to server: check the address"
    with pytest.raises(StoreError, match=error):
      store.read("a")
  assert capfd.readouterr().err.count("s3://bucket/x: no answer of http://127.0.0.1:9 yet") == 1
