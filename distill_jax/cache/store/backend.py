"""Reads and writes named values in a folder or an object store through TensorStore.

A value is replaced completely or not at all: a local file is written as `KEY.__lock`, synced and
renamed; an object store publishes a finished upload. The leftovers of a killed writer are never
listed, and the next write of that key overwrites them.
"""

import errno
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import tensorstore as ts

from distill_jax.errors import suggest
from distill_jax.storage import folders

SCHEMES = ("file", "gs", "memory", "s3")
_CONTEXT = ts.Context()  # shared, so that `memory://x` opened twice is the same store
# Two to six minutes: TensorStore's own 32 hide a misspelled address for a quarter of an hour.
_RETRIES = {"max_retries": 7}
_RETRIED = "retry attempts failed"  # TensorStore's words
_SILENT_SECONDS = 5.0
_UNFINISHED = ".__lock"
_PROBE = "writable"


class StoreError(OSError):
  """A value that cannot be read or written; `errno` is the operating system's, or None."""

  def __init__(self, text: str, number: int | None = None):
    super().__init__(text)
    self.errno = number


class Store(NamedTuple):
  """Values by key in one folder; see `open_store`.

  Attributes:
    url: the folder, for messages.
    folder: local folder with a file for each key; None for an object store or memory.
    kv: the TensorStore key-value store.
  """

  url: str
  folder: Path | None
  kv: ts.KvStore

  def read(self, key: str) -> bytes | None:
    """Returns the value; None without one.

    Raises:
      StoreError: it cannot be read.
    """
    return self.result(key, self.begin_read(key))

  def begin_read(self, key: str) -> ts.Future:
    """Starts to read a value; `result` waits for it."""
    if self.folder is not None:
      check_no_pipe(self.folder / key)
    return self.kv.read(key)

  def result(self, key: str, read: ts.Future) -> bytes | None:
    """Returns the value that `begin_read` started to read; None without one.

    Raises:
      StoreError: it cannot be read.
    """
    result = self._wait(f"read {key!r} from", lambda: read)
    return None if result.state == "missing" else result.value

  def put(self, key: str, value: bytes) -> None:
    """Writes or replaces a value: readers see the complete old or the complete new one.

    Raises:
      StoreError: the disk is full, the folder read-only, ...; the old value remains.
    """
    self._wait(f"write {key!r} to", lambda: self.kv.write(key, value))

  def create(self, key: str, value: bytes) -> bool:
    """Writes a value where there is none; of many simultaneous calls exactly one succeeds.

    Returns:
      Whether this call wrote it. False also means that the network lost the confirmation of this
      call's write: read the value to find out.

    Raises:
      StoreError: it cannot be read or written.
    """
    result = self._wait(f"read {key!r} from", lambda: self.kv.read(key))
    if result.state != "missing":
      return False
    # `if_equal=b""` would overwrite any value: an absent one has a generation as well.
    absent = result.stamp.generation
    stamp = self._wait(f"write {key!r} to", lambda: self.kv.write(key, value, if_equal=absent))
    return stamp.generation != b""

  def keys(self, prefix: str = "") -> list[str]:
    """Returns the keys that begin with this ASCII text, sorted.

    Raises:
      StoreError: the folder or the bucket cannot be listed.
    """
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    keys = self._wait("list", lambda: self.kv.list(ts.KvStore.KeyRange(prefix, end)))
    # Another tool may have copied a folder to a bucket, unfinished files included.
    return sorted(key for key in map(os.fsdecode, keys) if not key.endswith(_UNFINISHED))

  def path(self, key: str) -> Path | None:
    """Returns the file of a value, for memory-mapping; None unless the store is a local folder."""
    return None if self.folder is None else self.folder / key

  def probe_writable(self, nbytes: int = 0) -> None:
    """Checks before any computation that values can be written.

    Args:
      nbytes: bytes to be written, compared with the free space of a local disk.

    Raises:
      StoreError: the folder is read-only, the bucket does not exist, the disk has less room, ...
    """
    self._wait("write to", lambda: self.kv.write(_PROBE, b""))
    self._wait("write to", lambda: self.kv.write(_PROBE, None))
    if self.folder is not None:
      free = shutil.disk_usage(self.folder).free
      if free < nbytes:
        text = f"cannot write {nbytes:,} bytes to {self.url}: the disk has {free:,} free"
        raise StoreError(text, errno.ENOSPC)

  def _wait(self, action: str, start: Callable[[], ts.Future]) -> Any:
    try:
      return self._result(start())
    except (ValueError, NotImplementedError) as error:  # TensorStore raises no others
      raise _store_error(f"cannot {action} {self.url}", error) from error

  def _result(self, future: ts.Future) -> Any:
    """Returns a result; where it takes long, says so once in this process."""
    if self.folder is None:
      try:
        return future.result(timeout=_SILENT_SECONDS)
      except TimeoutError:
        server = self.kv.spec().to_json().get("endpoint", "its server")
        _print_once(f"{self.url}: no answer of {server} yet, trying for two to six minutes")
    return future.result()


def check_no_pipe(path: Path) -> None:
  """Raises StoreError for a pipe, which a reader would wait for for ever."""
  if path.is_fifo():
    raise StoreError(f"cannot read {path}: expected a regular file, got a pipe: remove it")


def open_store(url: str | os.PathLike[str]) -> Store:
  """Opens a folder of values; the first write creates it.

  Args:
    url: a local path, `file:///folder`, `gs://bucket/folder`, `s3://bucket/folder` or, for tests,
      `memory://name` (it lasts as long as the process). A query names other servers that speak S3:
      `s3://bucket/folder?endpoint=http://127.0.0.1:9000&region=eu-central-1`. Credentials come
      from where the clients of Google and Amazon look for them, never from the URL.

  Raises:
    ValueError: another scheme, or a part that the scheme does not have.
    StoreError: TensorStore rejects it (no such bucket name, ...).
  """
  url = os.fspath(url)
  has_scheme = re.match(r"[A-Za-z][\w+.-]*:/", url)
  spec, name, folder = _url_spec(url) if has_scheme else _local_spec(url)
  try:
    kv = ts.KvStore.open(spec, context=_CONTEXT).result()
  except ValueError as error:
    raise _store_error(f"cannot open {name}", error) from error
  return Store(name, folder, kv)


Spec = tuple[dict[str, Any], str, Path | None]  # TensorStore's, name for messages, local folder


def _local_spec(path: str) -> Spec:
  folder = Path(os.path.abspath(folders.resolve(path, "cache")))
  return {"driver": "file", "path": f"{folder}/"}, str(folder), folder


def _url_spec(url: str) -> Spec:
  parts = urlsplit(url)
  scheme = parts.scheme
  if scheme not in SCHEMES or "://" not in url:
    schemes = ", ".join(f"{name}://" for name in SCHEMES)
    raise ValueError(
      f"cache: expected a local path or one of {schemes}; got {url.partition('/')[0]}/..."
    )
  if "@" in parts.netloc or parts.fragment:  # not repeated in the message: it may be a password
    raise ValueError(f"cache: expected no user, no password and no fragment (#) in {scheme}://")
  options = _url_options(parts)
  if scheme == "file":
    if parts.netloc not in ("", "localhost"):
      raise ValueError(f"cache: expected an absolute path, file:///folder; got {url}")
    return _local_spec(unquote(parts.path))
  folder = parts.path.strip("/")
  name = f"{scheme}://{parts.netloc}/{folder}"
  prefix = f"{folder}/" if folder else ""
  if scheme == "memory":
    return {"driver": "memory", "path": f"{parts.netloc}/{prefix}"}, name, None
  driver = {"gs": "gcs", "s3": "s3"}[scheme]
  spec = {
    "driver": driver,
    "bucket": parts.netloc,
    "path": prefix,
    f"{driver}_request_retries": _RETRIES,
  }
  return spec | options, name, None


def _url_options(parts: SplitResult) -> dict[str, str]:
  """Returns the members of TensorStore's specification that a URL's query stands for."""
  members = {"endpoint": "endpoint", "region": "aws_region"} if parts.scheme == "s3" else {}
  query = parse_qs(parts.query, keep_blank_values=True)
  for option, values in query.items():
    if option not in members:
      hint = suggest(option, members) if members else ""
      raise ValueError(f"cache: expected an option of {parts.scheme}://, got {option!r}{hint}")
    if len(values) > 1 or not values[0]:
      raise ValueError(f"cache: expected one value for option {option!r}, got {values}")
  return {members[option]: values[0] for option, values in query.items()}


@functools.cache
def _print_once(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _store_error(text: str, error: Exception) -> StoreError:
  """Returns TensorStore's error in the operating system's words, or without a server's reply."""
  number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
  if number:
    return StoreError(f"{text}: {os.strerror(int(number[1]))}", int(number[1]))
  reason = str(error).partition(" [")[0]
  hint = ": check the address and the network, then call it again" if _RETRIED in reason else ""
  return StoreError(f"{text}: {reason}{hint}")
