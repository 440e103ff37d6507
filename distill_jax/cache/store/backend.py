"""Where a cache lies: named values in a folder or an object store, through TensorStore's key-value stores.

A value is replaced whole or not at all: a local file is written beside its place under `KEY.__lock`, synced and
renamed; an object store publishes a finished upload. What a killed writer leaves behind is never listed, and
the next write of that key overwrites it.
"""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import tensorstore as ts

from distill_jax.errors import suggest

SCHEMES = ("file", "gs", "memory", "s3")
_CONTEXT = ts.Context()  # one for all, so that `memory://x` opened twice is the same store
_RETRIES = {
  "max_retries": 7
}  # about a minute; TensorStore's own 32 hide a misspelled address for a quarter of an hour
_UNFINISHED = ".__lock"
_PROBE = "writable"


class StoreError(OSError):
  """A value could not be read or written; `errno` is the operating system's number where it gave one."""

  def __init__(self, text: str, number: int | None = None):
    super().__init__(text)
    self.errno = number


class Store(NamedTuple):
  """Values by key below one folder; see `open_store`.

  Attributes:
    url: the folder, for messages.
    folder: where the values lie as files of those names, None for an object store or memory.
    kv: TensorStore's own.
  """

  url: str
  folder: Path | None
  kv: ts.KvStore

  def read(self, key: str) -> bytes | None:
    """The value, None if there is none.

    Raises:
      StoreError: it cannot be read.
    """
    return self.result(key, self.begin_read(key))

  def begin_read(self, key: str) -> ts.Future:
    """Begins to read a value; `result` waits for it."""
    return self.kv.read(key)

  def result(self, key: str, reading: ts.Future) -> bytes | None:
    """The value that `begin_read` began to read, None if there is none.

    Raises:
      StoreError: it cannot be read.
    """
    found = self._wait(f"read {key!r} from", lambda: reading)
    return None if found.state == "missing" else found.value

  def put(self, key: str, value: bytes) -> None:
    """Write or replace a value: readers see the old one or the new one, whole.

    Raises:
      StoreError: the disk is full, the folder read-only, ...; what was there stays.
    """
    self._wait(f"write {key!r} to", lambda: self.kv.write(key, value))

  def create(self, key: str, value: bytes) -> bool:
    """Write a value where there is none: of many who try at once exactly one succeeds.

    False is also the answer when the network lost the confirmation of an own write: read what is there.

    Raises:
      StoreError: it cannot be read or written.
    """
    found = self._wait(f"read {key!r} from", lambda: self.kv.read(key))
    if found.state != "missing":
      return False
    # `if_equal=b""` would overwrite whatever is there: "nothing" has a generation of its own.
    absent = found.stamp.generation
    written = self._wait(f"write {key!r} to", lambda: self.kv.write(key, value, if_equal=absent))
    return written.generation != b""

  def keys(self, prefix: str = "") -> list[str]:
    """The keys that begin with this ASCII text, sorted.

    Raises:
      StoreError: the folder or the bucket cannot be listed.
    """
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    found = self._wait("list", lambda: self.kv.list(ts.KvStore.KeyRange(prefix, end)))
    # Another tool may have copied a folder to a bucket, unfinished files included.
    return sorted(key for key in map(os.fsdecode, found) if not key.endswith(_UNFINISHED))

  def path(self, key: str) -> Path | None:
    """The file that holds the value, to map it into memory; None unless the store is a local folder."""
    return None if self.folder is None else self.folder / key

  def probe_writable(self, nbytes: int = 0) -> None:
    """Find out that nothing can be written before anything is computed.

    Args:
      nbytes: how much is to be written; compared with the free space of a local disk.

    Raises:
      StoreError: the folder is read-only, the bucket does not exist, the disk has less room, ...
    """
    self._wait("write to", lambda: self.kv.write(_PROBE, b""))
    self._wait("write to", lambda: self.kv.write(_PROBE, None))
    if self.folder is not None:
      free = shutil.disk_usage(self.folder).free
      if free < nbytes:
        text = f"cannot write {nbytes:,} bytes to {self.url}: the disk has {free:,} left"
        raise StoreError(text, errno.ENOSPC)

  def _wait(self, action, start):
    try:
      return start().result()
    except (ValueError, NotImplementedError) as error:  # TensorStore raises no others
      raise _translated(f"cannot {action} {self.url}", error) from error


def open_store(url: str | os.PathLike[str]) -> Store:
  """A folder of values; it is made by the first write.

  Args:
    url: a local path, `file:///folder`, `gs://bucket/folder`, `s3://bucket/folder` or, for tests, `memory://name`
      (kept while the process lives). Servers that speak S3 are named by a query:
      `s3://bucket/folder?endpoint=http://127.0.0.1:9000&region=eu-central-1`. Credentials come from where the
      clients of Google and Amazon look for them, never from the URL.

  Raises:
    ValueError: another scheme, or a part that the scheme does not have.
    StoreError: TensorStore refuses it (no such bucket name, ...).
  """
  url = os.fspath(url)
  spec, name, folder = _parsed(url) if re.match(r"[A-Za-z][\w+.-]*:/", url) else _local(url)
  try:
    kv = ts.KvStore.open(spec, context=_CONTEXT).result()
  except ValueError as error:
    raise _translated(f"cannot open {name}", error) from error
  return Store(name, folder, kv)


def _local(path):
  folder = Path(os.path.abspath(os.path.expanduser(path)))
  return {"driver": "file", "path": f"{folder}/"}, str(folder), folder


def _parsed(url):
  parts = urlsplit(url)
  scheme = parts.scheme
  if scheme not in SCHEMES or "://" not in url:
    known = ", ".join(f"{known}://" for known in SCHEMES)
    raise ValueError(
      f"cache: expected a local path or one of {known}; got {url.partition('/')[0]}/..."
    )
  if "@" in parts.netloc or parts.fragment:  # not repeated in the message: it may be a password
    raise ValueError(f"cache: {scheme}:// takes no user, no password and no fragment (#)")
  query = _query(parts)
  if scheme == "file":
    if parts.netloc not in ("", "localhost"):
      raise ValueError(f"cache: file:// takes an absolute path, file:///folder; got {url}")
    return _local(unquote(parts.path))
  folder = parts.path.strip("/")
  name = f"{scheme}://{parts.netloc}/{folder}"
  below = f"{folder}/" if folder else ""
  if scheme == "memory":
    return {"driver": "memory", "path": f"{parts.netloc}/{below}"}, name, None
  driver = {"gs": "gcs", "s3": "s3"}[scheme]
  spec = {
    "driver": driver,
    "bucket": parts.netloc,
    "path": below,
    f"{driver}_request_retries": _RETRIES,
  }
  return spec | query, name, None


def _query(parts) -> dict[str, str]:
  """The members of TensorStore's specification that an URL's options stand for."""
  options = {"endpoint": "endpoint", "region": "aws_region"} if parts.scheme == "s3" else {}
  found = parse_qs(parts.query, keep_blank_values=True)
  for option, values in found.items():
    if option not in options:
      known = suggest(option, options) if options else ""
      raise ValueError(f"cache: {parts.scheme}:// has no option {option!r}{known}")
    if len(values) > 1 or not values[0]:
      raise ValueError(f"cache: option {option!r} takes one value, got {values}")
  return {options[option]: values[0] for option, values in found.items()}


def _translated(text: str, error: Exception) -> StoreError:
  """TensorStore's error in the operating system's words where it has any, without a server's whole answer."""
  number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
  if number:
    return StoreError(f"{text}: {os.strerror(int(number[1]))}", int(number[1]))
  return StoreError(f"{text}: {str(error).partition(' [')[0]}")
