"""Tokenizes text once into a file, maps it into memory and packs rows of it on demand.

    corpus = tokenize("corpus", "work/tokens", length=1024) fit(student, teacher, objective,
    optimizer, TextStream(corpus, 32, seed=0), ignore_label=data.UNLABELED, ...)

Rows and ids are those of `text.load`, so that a teacher cache of the one is that of the other. The
folder holds

    tokens.bin   every document as `end` and its tokens, one after the other, then `end`;
                 little-endian, of `dtype`
    starts.bin   the position in tokens.bin at which each document begins, int64, little-endian
    index.json   the tokenizer, files, counts and checksums; written last

Each file gets its name when it is complete, so that several jobs may tokenize into one folder.
"""

import contextlib
import dataclasses
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.data.batches import HostBatch
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.text.documents import list_files, read_documents
from distill_jax.data.text.packed import check_document, check_length
from distill_jax.data.text.tokenizer import BYTES, Tokenizer
from distill_jax.storage import files, folders, sealed_json

INDEX = "index.json"
_TEMPORARY = ".new"
_COUNTS = ("documents", "empty", "skipped", "tokens")
MAX_ROWS = 2**31 - 1
"""Ids are int32."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedText:
  """The packed rows of `text.pack`, read from a file on demand.

  Attributes:
    tokens: the tokens of all documents, [tokens + 1], mapped into memory.
    starts: the position of each document in `tokens`, int64 [documents], mapped into memory.
    length: tokens in a row.
    ids: int32 [rows], the selected rows; they take 4 bytes of memory a row, and nothing else does.
    index: the members of index.json.
  """

  tokens: np.ndarray = dataclasses.field(repr=False)
  starts: np.ndarray = dataclasses.field(repr=False)
  length: int
  ids: np.ndarray = dataclasses.field(repr=False)
  index: dict[str, Any]

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def name(self) -> str:
    """The name of the text that the ids index."""
    return self.index["name"]

  @property
  def classes(self) -> int:
    """The number of tokens in the vocabulary."""
    return self.index["classes"]

  @property
  def class_names(self) -> tuple[str, ...]:
    """One name per class, as in the `Source`."""
    return tuple(map(str, range(self.classes)))

  @property
  def vocabulary(self) -> str:
    """The tokenizer's identity."""
    return self.index["vocabulary"]

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape [rows, ...] and dtype of the arrays."""
    names = ("tokens", "label", "segments", "positions")
    rows = {name: jax.ShapeDtypeStruct((len(self), self.length), np.int32) for name in names}
    return {"id": jax.ShapeDtypeStruct((len(self),), np.int32)} | rows

  def take(self, rows: Any) -> "PackedText":
    """Returns the text of these rows (indices, a mask or a slice) with their ids."""
    return dataclasses.replace(self, ids=self.ids[rows])

  def rows(self, ids: np.ndarray) -> HostBatch:
    """Returns 'id' and the arrays of `text.pack` for rows of the text, which are not checked."""
    ids = np.asarray(ids, np.int32)
    row_starts = ids[:, None].astype(np.int64) * self.length
    indices = row_starts + np.arange(self.length + 1)
    count = len(self.tokens) - 1
    tokens = self.tokens[np.minimum(indices, count)].astype(np.int32)
    indices = indices[:, :-1]
    segments = np.searchsorted(self.starts, indices, side="right") - 1
    positions = indices - np.maximum(self.starts[segments], row_starts)
    valid = indices < count
    return {
      "id": ids,
      "tokens": np.where(valid, tokens[:, :-1], np.int32(self.index["end"])),
      "label": np.where(valid, tokens[:, 1:], np.int32(UNLABELED)),
      "segments": np.where(valid, segments, -1).astype(np.int32),
      "positions": np.where(valid, positions, 0).astype(np.int32),
    }

  def in_memory(self) -> Source:
    """Returns the rows as a `Source`, for evaluation."""
    return Source(
      self.rows(self.ids),
      self.classes,
      name=self.name,
      ignore_label=UNLABELED,
      vocabulary=self.vocabulary,
    )


def tokenize(
  path: str | Path,
  folder: str | Path,
  *,
  length: int,
  tokenizer: Tokenizer = BYTES,
  suffix: str = ".txt",
  separator: str | None = None,
  progress: bool = True,
) -> PackedText:
  """Writes the tokens of text files, a document at a time, or opens those of an earlier call.

  Args:
    path, tokenizer, suffix, separator: as for `text.load`.
    folder: folder for the tokens.
    length: tokens in a row, at least 2; it may differ from call to call.
    progress: prints the number of documents, how many of them are empty, and what was skipped.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: as for `text.load`, or the folder holds tokens of another text or tokenizer (with
      the field's name).
    OSError: the folder cannot be written, or its files are corrupt.
  """
  check_length(length)
  root = folders.resolve(path, "path")
  folder = folders.resolve(folder, "folder")
  expected = _describe(root, tokenizer, suffix, separator)
  if not (folder / INDEX).exists():
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary_files(folder, "tokens.bin", "starts.bin", INDEX) as temporary:
      tokens, starts, index_file = temporary
      counts = _write(root, tokens, starts, tokenizer, suffix, separator)
      sums = {"tokens": files.digest(tokens), "starts": files.digest(starts)}
      index_file.write_text(sealed_json.dumps(expected | counts | {"checksums": sums}, indent=2))
  index = _read_index(folder, expected)
  for field, value in expected.items():
    if index[field] != value:
      raise ValueError(
        f"{field}: expected {value!r}, got {index[field]!r} in {folder}: name another folder or "
        "delete this one"
      )
  if progress:
    print(
      f"text: read {index['tokens']:,} tokens of {index['documents']:,} documents in {folder}, "
      f"{index['empty']:,} of them empty; skipped {index['skipped']:,} times nothing between "
      "separators",
      flush=True,
    )
  return _open(folder, index, length)


def _describe(
  root: Path, tokenizer: Tokenizer, suffix: str, separator: str | None
) -> dict[str, Any]:
  """Returns the values by which the tokens of one text and tokenizer differ from others."""
  digest = hashlib.blake2b(digest_size=16)
  for file in list_files(root, suffix):
    stat = file.stat()
    digest.update(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return {
    "name": root.resolve().stem,
    "vocabulary": tokenizer.identity,
    "classes": tokenizer.size,
    "end": tokenizer.end,
    "dtype": _token_dtype(tokenizer).str,
    "separator": separator,
    "files": digest.hexdigest(),
  }


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
  return np.min_scalar_type(tokenizer.size - 1).newbyteorder("<")


@contextlib.contextmanager
def _temporary_files(folder: Path, *names: str) -> Iterator[list[Path]]:
  """Names files of this call alone; at the end they are synced and renamed in order, unless another
  job was faster, which has then the last of the names.
  """
  token = uuid.uuid4().hex
  temporary = [folder / f".{name}.{token}{_TEMPORARY}" for name in names]
  try:
    yield temporary
    for path, name in zip(temporary, names):
      if not (folder / names[-1]).exists():
        with open(path, "rb+") as file:
          os.fsync(file.fileno())
        path.replace(folder / name)
    # What killed jobs left. A job that still writes there finds the last of the names instead.
    temporary = list(folder.glob(f".*{_TEMPORARY}"))
  except FileNotFoundError:
    if not (folder / names[-1]).exists():
      raise
  finally:
    for path in temporary:
      path.unlink(missing_ok=True)


def _read_index(folder: Path, fields: Iterable[str]) -> dict[str, Any]:
  try:
    return sealed_json.read(folder / INDEX, *fields, *_COUNTS, "checksums")
  except ValueError as error:
    raise OSError(f"{error}: delete {folder} and tokenize again") from error


def _write(
  root: Path,
  tokens_file: Path,
  starts_file: Path,
  tokenizer: Tokenizer,
  suffix: str,
  separator: str | None,
) -> dict[str, int]:
  """Writes the two files, and returns the counts of index.json."""
  counts = dict.fromkeys(_COUNTS, 0)
  dtype = _token_dtype(tokenizer)
  with (
    files.naming(tokens_file.parent),
    open(tokens_file, "wb") as tokens,
    open(starts_file, "wb") as starts,
  ):
    for document in read_documents(root, tokenizer, suffix, separator):
      if document is None:
        counts["skipped"] += 1
        continue
      check_document(document, tokenizer.size, counts["documents"])
      starts.write(np.array(counts["tokens"], "<i8").tobytes())
      tokens.write(np.concatenate([[tokenizer.end], document]).astype(dtype).tobytes())
      counts["documents"] += 1
      counts["empty"] += not len(document)
      counts["tokens"] += len(document) + 1
    tokens.write(np.array(tokenizer.end, dtype).tobytes())
  if counts["documents"] == counts["empty"]:
    raise ValueError(f"path: expected text, got none in {root}")
  return counts


def _open(folder: Path, index: dict[str, Any], length: int) -> PackedText:
  sums = index["checksums"]
  tokens = _map_file(folder, "tokens", index["dtype"], index["tokens"] + 1, sums["tokens"])
  starts = _map_file(folder, "starts", "<i8", index["documents"], sums["starts"])
  rows = -(-index["tokens"] // length)
  if rows > MAX_ROWS:
    least = -(-index["tokens"] // MAX_ROWS)
    raise ValueError(
      f"length: expected at least {least}, for at most {MAX_ROWS:,} rows (ids are int32), got "
      f"{length} and {rows:,} rows"
    )
  return PackedText(tokens, starts, length, np.arange(rows, dtype=np.int32), index)


def _map_file(folder: Path, name: str, dtype: str, count: int, checksum: str) -> np.ndarray:
  path = folder / f"{name}.bin"
  size = np.dtype(dtype).itemsize * count
  advice = f"delete {folder} and tokenize again"
  if not path.exists() or path.stat().st_size != size:
    raise OSError(f"{path} is corrupt: expected {size:,} bytes: {advice}")
  if files.digest(path) != checksum:
    raise OSError(f"{path} is corrupt: its checksum differs from the one in {INDEX}: {advice}")
  return np.memmap(path, dtype, "r")
