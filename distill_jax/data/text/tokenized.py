"""Text beyond memory: tokens in a file that is written once and mapped, and the packed rows that lie in it.

    corpus = tokenize("corpus", "work/tokens", length=1024)
    fit(student, teacher, objective, optimizer, TextStream(corpus, 32, seed=0), ignore_label=data.UNLABELED, ...)

Rows and ids are those of `text.load`, so that a teacher cache of the one is that of the other. The folder holds

    tokens.bin   every document as `end` and its tokens, one after the other, then `end`; little-endian, of `dtype`
    starts.bin   where each document begins, int64, little-endian
    index.json   what they are: tokenizer, files, counts; written last
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.data.batches import HostBatch
from distill_jax.data.checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.text.packed import BYTES, Tokenizer, check_document, documents_of, files_of
from distill_jax.storage import files

INDEX = "index.json"
ROWS = 2**31 - 1  # ids are int32


@dataclasses.dataclass(frozen=True, eq=False)
class PackedText:
  """The packed rows of `text.pack`, read from a file when they are asked for.

  Attributes:
    tokens, starts: the files, mapped into memory.
    length: tokens in a row.
    ids: int32, of the rows that are meant; 4 bytes a row are all that is held.
    about: the members of index.json.
  """

  tokens: np.ndarray = dataclasses.field(repr=False)
  starts: np.ndarray = dataclasses.field(repr=False)
  length: int
  ids: np.ndarray = dataclasses.field(repr=False)
  about: dict[str, Any]

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def name(self) -> str:
    return self.about["name"]

  @property
  def classes(self) -> int:
    return self.about["classes"]

  @property
  def class_names(self) -> tuple[str, ...]:
    """As those of the `Source`."""
    return tuple(map(str, range(self.classes)))

  @property
  def vocabulary(self) -> str:
    """The tokenizer's identity."""
    return self.about["vocabulary"]

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape [rows, ...] and dtype of the arrays."""
    names = ("tokens", "label", "segments", "positions")
    rows = {name: jax.ShapeDtypeStruct((len(self), self.length), np.int32) for name in names}
    return {"id": jax.ShapeDtypeStruct((len(self),), np.int32)} | rows

  def take(self, rows) -> "PackedText":
    """The rows at these places (numbers, a mask or a slice), with the ids they have here."""
    return dataclasses.replace(self, ids=self.ids[rows])

  def rows(self, ids: np.ndarray) -> HostBatch:
    """The rows of these ids (they are known): 'id' and the arrays of `text.pack`."""
    ids = np.asarray(ids, np.int32)
    begins = ids[:, None].astype(np.int64) * self.length
    places = begins + np.arange(self.length + 1)
    count = len(self.tokens) - 1
    read = self.tokens[np.minimum(places, count)].astype(np.int32)
    places = places[:, :-1]
    segments = np.searchsorted(self.starts, places, side="right") - 1
    valid = places < count
    return {
      "id": ids,
      "tokens": np.where(valid, read[:, :-1], np.int32(self.about["end"])),
      "label": np.where(valid, read[:, 1:], np.int32(UNLABELED)),
      "segments": np.where(valid, segments, -1).astype(np.int32),
      "positions": np.where(valid, places - np.maximum(self.starts[segments], begins), 0).astype(
        np.int32
      ),
    }

  def in_memory(self) -> Source:
    """The rows as a `Source`, for evaluation."""
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
  """Writes the tokens of text files, one document in memory at a time, or opens what an earlier call wrote.

  Args:
    path, length, tokenizer, suffix, separator: as for `text.load`; the length may differ from call to call.
    folder: for the tokens.
    progress: prints how many documents there are, how many of them empty, and what was skipped.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: as for `text.load`, or the folder holds tokens of another text or tokenizer: the field is named.
    OSError: the folder cannot be written, or what is there is damaged.
  """
  if length < 2:
    raise ValueError(f"length must be at least 2, got {length}")
  root, folder = Path(path), Path(folder)
  wanted = _wanted(root, tokenizer, suffix, separator)
  if not (folder / INDEX).exists():
    folder.mkdir(parents=True, exist_ok=True)
    counts = _write(root, folder, tokenizer, suffix, separator)
    files.write(folder / INDEX, json.dumps(wanted | counts, indent=1))
  about = json.loads((folder / INDEX).read_text())
  for field, value in wanted.items():
    if about[field] != value:
      raise ValueError(
        f"{folder} holds other tokens; name another folder or delete it: {field} is {about[field]!r} there, {value!r} "
        "wanted"
      )
  if progress:
    print(
      f"text: {about['tokens']:,} tokens of {about['documents']:,} documents in {folder}, {about['empty']:,} of them "
      f"empty; {about['skipped']:,} times nothing between separators",
      flush=True,
    )
  return _opened(folder, about, length)


def _wanted(root: Path, tokenizer: Tokenizer, suffix: str, separator: str | None) -> dict[str, Any]:
  """What tells the tokens from others."""
  listed = hashlib.blake2b(digest_size=16)
  for file in files_of(root, suffix):
    stat = file.stat()
    listed.update(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return {
    "name": root.resolve().stem,
    "vocabulary": tokenizer.identity,
    "classes": tokenizer.size,
    "end": tokenizer.end,
    "dtype": np.min_scalar_type(tokenizer.size - 1).newbyteorder("<").str,
    "separator": separator,
    "files": listed.hexdigest(),
  }


def _write(root: Path, folder: Path, tokenizer: Tokenizer, suffix, separator) -> dict[str, int]:
  counts = {"documents": 0, "empty": 0, "skipped": 0, "tokens": 0}
  dtype = np.min_scalar_type(tokenizer.size - 1).newbyteorder("<")
  with open(folder / "tokens.bin", "wb") as tokens, open(folder / "starts.bin", "wb") as starts:
    for document in documents_of(root, tokenizer, suffix, separator):
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
    raise ValueError(f"{root} holds no text")
  return counts


def _opened(folder: Path, about: dict[str, Any], length: int) -> PackedText:
  found = {}
  for name, dtype, count in (
    ("tokens", about["dtype"], about["tokens"] + 1),
    ("starts", "<i8", about["documents"]),
  ):
    path, size = folder / f"{name}.bin", np.dtype(dtype).itemsize * count
    if not path.exists() or path.stat().st_size != size:
      raise OSError(
        f"{path} is damaged: expected {size:,} bytes. Delete {folder} and tokenize again"
      )
    found[name] = np.memmap(path, dtype, "r")
  rows = -(-about["tokens"] // length)
  if rows > ROWS:
    least = -(-about["tokens"] // ROWS)
    raise ValueError(
      f"length: {length} makes {rows:,} rows, more than the ids {ROWS:,}; least is {least}"
    )
  return PackedText(
    found["tokens"], found["starts"], length, np.arange(rows, dtype=np.int32), about
  )
