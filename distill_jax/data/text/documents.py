"""Reads the documents of text files one after another."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill_jax.data.text.tokenizer import Tokenizer

BLOCK = 2**24
"""Bytes of a file that are read at once."""


def read_documents(
  root: Path, tokenizer: Tokenizer, suffix: str, separator: str | None
) -> Iterator[np.ndarray | None]:
  """Iterates over the tokens of documents; holds one document and `BLOCK` bytes in memory.

  Args:
    root: a file, or a folder whose files, at any depth, are read in the order of their paths.
    tokenizer: encodes each document.
    suffix: ending of the files of a folder to read.
    separator: text between two documents of a file; None: each file is a document.

  Returns:
    An iterator of int [N] without `end`; None where there is nothing between two separators.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: a folder without such files, or a document that the tokenizer cannot read (with the
      file's name).

  >>> import pathlib, tempfile
  >>> from distill_jax.data import text
  >>> path = pathlib.Path(tempfile.mkdtemp(), "lines.txt")
  >>> path.write_text("to be;or not")
  12
  >>> [len(document) for document in text.read_documents(path, text.BYTES, ".txt", ";")]
  [5, 6]
  """
  for file in list_files(root, suffix):
    for part in _split_file(file, separator):
      try:
        yield None if separator is not None and not part else tokenizer.encode(part)
      except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def list_files(root: Path, suffix: str) -> list[Path]:
  """Returns a file, or the files below a folder with this ending, in the order of their paths.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: the folder has no such files.
  """
  if root.is_file():
    return [root]
  if not root.is_dir():
    raise FileNotFoundError(f"path: expected a file or folder, got {root}, which does not exist")
  files = sorted(file for file in root.rglob(f"*{suffix}") if not file.is_dir())
  if not files:
    raise ValueError(f"suffix: expected files that end in {suffix}, got none in {root}")
  for file in files:
    if not file.is_file():
      raise ValueError(
        f"path: expected text, got {file}, which is no regular file or a link to none: remove it"
      )
  return files


def _split_file(file: Path, separator: str | None) -> Iterator[bytes]:
  """Iterates over the text between separators; without one, returns the full file."""
  if separator is None:
    yield file.read_bytes()
    return
  mark = separator.encode()
  rest = b""
  with open(file, "rb") as stream:
    while block := stream.read(BLOCK):
      *parts, rest = (rest + block).split(mark)
      yield from parts
  yield rest
