"""Packs documents into rows of tokens, for language models: a `Source` for `data.batches`.

    train = text.load("corpus", length=256)  # every .txt file is a document, its bytes are the
    tokens

A row holds `length` tokens of one document after another. Every document begins with the token
`end`, and its last label is `end`, so that each of its tokens is predicted once; a document that a
row cuts continues in the next row, with positions from 0. For text beyond memory see `tokenized`
and `stream`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.text.documents import read_documents
from distill_jax.data.text.tokenizer import BYTES, Tokenizer
from distill_jax.storage import folders


def load(
  path: str | Path,
  *,
  length: int,
  tokenizer: Tokenizer = BYTES,
  suffix: str = ".txt",
  separator: str | None = None,
) -> Source:
  """Packs the documents of a file or a folder; see `pack` for the arrays of the source.

  Args:
    path: a file, or a folder whose files, at any depth, are read in the order of their paths.
    length: tokens in a row, at least 2.
    tokenizer: encodes each document.
    suffix: ending of the files of a folder to read.
    separator: text between two documents of a file; None: each file is a document. Nothing between
      two separators is no document.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: no files, no text, a document that the tokenizer cannot read (with the file's name),
      or length < 2.

  >>> import pathlib, tempfile
  >>> from distill_jax.data import text
  >>> folder = pathlib.Path(tempfile.mkdtemp())
  >>> (folder / "hamlet.txt").write_text("to be")
  5
  >>> text.load(folder, length=6).arrays["label"]  # 256 is the end of the document
  array([[116, 111,  32,  98, 101, 256]], dtype=int32)
  """
  root = folders.resolve(path, "path")
  documents = [d for d in read_documents(root, tokenizer, suffix, separator) if d is not None]
  if not any(map(len, documents)):
    raise ValueError(f"path: expected text, got none in {root}")
  return pack(documents, length=length, tokenizer=tokenizer, name=root.resolve().stem)


def pack(
  documents: Sequence[Sequence[int] | np.ndarray],
  *,
  length: int,
  tokenizer: Tokenizer = BYTES,
  name: str = "text",
  row_per_document: bool = False,
) -> Source:
  """Packs tokens into rows of `length`; the last row is filled up with `end`.

  Args:
    documents: the tokens of each document, without `end`. An empty one is only `end`, with the
      label `end`.
    length: tokens in a row, at least 2.
    tokenizer: the tokenizer of these tokens.
    name: name of the source.
    row_per_document: whether each document begins a row of its own, which is filled up after it; a
      longer one continues in the next rows.

  Returns:
    A `Source` of arrays [rows, length], int32:

    - `tokens`: the inputs of the model.
    - `label`: the document's next token, also where the next row holds it; `UNLABELED` where the
      row is filled up.
    - `segments`: the index of the document; -1 where the row is filled up.
    - `positions`: the position in the part of the document that is in this row, from 0.

    Ids number the rows: they change with the documents, the tokenizer and the length. `vocabulary`
    is the tokenizer's identity, so that a cache of teacher outputs for other tokens raises.

  Raises:
    ValueError: no documents, length < 2, or a token outside the vocabulary.

  >>> from distill_jax.data import text
  >>> source = text.pack([text.BYTES.encode(b"to be"), text.BYTES.encode(b"or")], length=5)
  >>> source.arrays["segments"]  # documents 0 and 1; -1 fills the row up
  array([[ 0,  0,  0,  0,  0],
         [ 0,  1,  1,  1, -1]], dtype=int32)
  """
  check_length(length)
  if not len(documents):
    raise ValueError("documents: expected at least one, got none")
  sizes = np.array([len(document) + 1 for document in documents])
  spans = -(-sizes // length) * length if row_per_document else sizes
  starts = np.cumsum(spans) - spans
  tokens = np.full(spans.sum(), tokenizer.end, np.int32)
  labels = np.full_like(tokens, UNLABELED)
  segments = np.full_like(tokens, -1)
  for number, (start, document) in enumerate(zip(starts, documents)):
    check_document(document, tokenizer.size, number)
    end = start + len(document)
    labels[start:end] = document
    labels[end] = tokenizer.end
    tokens[start + 1 : end + 1] = document
    segments[start : end + 1] = number
  # Positions count from the start of the document or of the row, whichever is later.
  indices = np.arange(len(tokens))
  positions = indices - np.maximum(np.repeat(starts, spans), indices // length * length)
  positions = np.where(segments < 0, 0, positions)
  arrays = {
    "tokens": _to_rows(tokens, length, tokenizer.end),
    "label": _to_rows(labels, length, UNLABELED),
    "segments": _to_rows(segments, length, -1),
    "positions": _to_rows(positions, length, 0),
  }
  return Source(
    arrays, tokenizer.size, name=name, ignore_label=UNLABELED, vocabulary=tokenizer.identity
  )


def check_length(length: int) -> None:
  """Raises a ValueError for rows of fewer than two tokens."""
  if length < 2:
    raise ValueError(f"length: expected at least 2, got {length}")


def check_document(document: Sequence[int] | np.ndarray, size: int, number: int) -> None:
  """Raises a ValueError, with the document's number, for tokens outside a vocabulary of `size`."""
  values = np.asarray(document)
  if values.size and not (
    np.issubdtype(values.dtype, np.integer) and 0 <= values.min() and values.max() < size
  ):
    raise ValueError(
      f"documents: expected tokens that are integers in [0, {size - 1}], got others in document "
      f"{number}"
    )


def _to_rows(values: np.ndarray, length: int, fill: int) -> np.ndarray:
  """Returns values [N] as [rows, length], filled up at the end."""
  rows = -(-len(values) // length)
  filled = np.pad(values, (0, rows * length - len(values)), constant_values=fill)
  return filled.reshape(rows, length)
