"""Writes files atomically: a killed run leaves the old one or the new one. Errors name the path."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write(path: Path, content: str | bytes) -> None:
  """Writes a file under a temporary name next to it, and renames it.

  Args:
    path: replaced if it exists; its folder must exist.
    content: text is encoded as UTF-8.

  Raises:
    OSError: it cannot be written; an older file stays as it was.
  """
  temporary = path.with_name(f".{path.name}.new")
  with naming(path):
    try:
      with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise


def read(path: Path) -> bytes:
  """Returns the content of a regular file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a folder or a pipe, which would wait for ever; the message names it.
  """
  if path.exists() and not path.is_file():
    raise ValueError(f"{path}: expected a regular file, got another kind: remove it")
  return path.read_bytes()


def digest(path: Path) -> str:
  """Returns 32 hexadecimal digits that depend on every byte of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Lets errors of a disk say where: those of `write` and `fsync` name no file."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def is_disk_full(error: BaseException) -> bool:
  """Returns whether an error, or one that caused it, tells of a full disk or quota."""
  cause: BaseException | None = error
  while cause is not None:
    texts = map(os.strerror, _FULL)
    if getattr(cause, "errno", None) in _FULL or any(text in str(cause) for text in texts):
      return True
    cause = cause.__cause__ or cause.__context__
  return False


def missing_space(error: BaseException, folder: Path, needed: int) -> str:
  """Returns the end of a message on a full disk, with bytes; '' for all other errors."""
  if not is_disk_full(error):
    return ""
  return f" ({needed:,} bytes needed, {shutil.disk_usage(folder).free:,} free)"
