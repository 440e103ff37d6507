"""Reads the folder or file that a person names: a path, `~` or `file://`, but no other URL."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

# `Path` turns `s3://b` into `s3:/b`. One letter is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def resolve(folder: str | os.PathLike, field: str) -> Path:
  """Returns the absolute path of a local or mounted folder or file; nothing is created.

  Args:
    folder: relative to the working directory, absolute, below `~`, or `file:///ABSOLUTE`.
    field: name of the argument or flag, for errors.

  Raises:
    ValueError: it is a URL of an object store, of another user's unknown home, or empty.

  >>> resolve("file:///data/my%20run", "folder").as_posix()
  '/data/my run'
  """
  text = os.fspath(folder)
  if not isinstance(text, str) or not text.strip() or "\0" in text:
    raise ValueError(f"{field}: expected a path, got {text!r}: name one, such as 'runs/first'")
  if _URL.match(text):
    text = _path_of(text, field)
  path = os.path.expanduser(text)
  if "\\" in path and os.sep == "/":
    raise ValueError(
      f"{field}: expected a path without a backslash, which TensorStore takes for a '/', got "
      f"{text!r}: rename it"
    )
  if path.startswith("~"):
    raise ValueError(
      f"{field}: expected a path, got {text!r} of an unknown user: write './{text}' for a folder "
      "of this name"
    )
  return Path(path).absolute()


def resolve_run(folder: str | os.PathLike, field: str) -> Path:
  """Returns the absolute path of a folder for checkpoints; as `resolve`, and rejects brackets.

  Raises:
    ValueError: as `resolve`, or Orbax would not find there what it wrote.
  """
  path = resolve(folder, field)
  if "[" in str(path):
    raise ValueError(
      f"{field}: expected a folder without '[', which Orbax takes for a pattern, got {path}: "
      "rename it"
    )
  return path


def _path_of(url: str, field: str) -> str:
  parts = urlsplit(url)
  scheme = parts.scheme.lower()
  if scheme == "file" and parts.netloc in ("", "localhost"):
    # `Path` has removed two of the slashes, or they were never there: the rest is the same.
    return unquote("/" + url.partition(":")[2].removeprefix("//localhost").lstrip("/"))
  if scheme == "file":
    hint = f"write file:///{parts.netloc}{parts.path} for an absolute path, or no file://"
  else:
    hint = "mount the bucket and name the folder there, or copy the run to it afterwards"
  raise ValueError(f"{field}: expected a local or mounted path, got the URL {url}: {hint}")
