"""Text files as packed rows of tokens, for language models: a `Source` for `data.batches`.

    train = text.load("corpus", length=256)  # every .txt file is a document, its bytes are the tokens

A row holds `length` tokens of one document after another. Every document begins with the token `end`, and its last
label is `end`, so that each of its tokens is predicted once; a document that a row cuts goes on in the next row, with
positions from 0. For text beyond memory see `tokenized` and `text_stream`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.data.checks import UNLABELED
from distill_jax.data.source import Source

END = "<|end|>"
BLOCK = 2**24  # bytes of a file that are read at once


class Tokenizer(NamedTuple):
  """Text to tokens and back.

  Attributes:
    encode: a document's bytes -> its tokens, int [N], without `end`. Raises ValueError for bytes it cannot read.
    decode: tokens -> text; `end` and broken UTF-8 show as replacement characters.
    size: of the vocabulary.
    end: the token that begins and ends documents.
    identity: equal for equal vocabularies, and for these alone.
  """

  encode: Callable[[bytes], np.ndarray]
  decode: Callable[[Iterable[int]], str]
  size: int
  end: int
  identity: str


def _bytes_to_text(tokens: Iterable[int]) -> str:
  return b"".join(bytes([t]) if t < 256 else "\ufffd".encode() for t in tokens).decode(
    errors="replace"
  )


BYTES = Tokenizer(lambda text: np.frombuffer(text, np.uint8), _bytes_to_text, 257, 256, "bytes")
"""Every byte is a token, and 256 is `end`: any file can be read, nothing has to be trained."""


def load(
  path: str | Path,
  *,
  length: int,
  tokenizer: Tokenizer = BYTES,
  suffix: str = ".txt",
  separator: str | None = None,
) -> Source:
  """Documents of a file or a folder, packed; see `pack` for what the source holds.

  Args:
    path: a file, or a folder whose files, at any depth, are read in the order of their paths.
    length: tokens in a row.
    tokenizer: of the documents.
    suffix: of the files of a folder that are read.
    separator: what stands between documents of one file; None: a file is a document. Nothing between two separators
      is no document.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: no files, no text, a document that the tokenizer cannot read (the file is named), or length < 2.
  """
  root = Path(path)
  documents = [d for d in documents_of(root, tokenizer, suffix, separator) if d is not None]
  if not any(map(len, documents)):
    raise ValueError(f"{root} holds no text")
  return pack(documents, length=length, tokenizer=tokenizer, name=root.resolve().stem)


def documents_of(
  root: Path, tokenizer: Tokenizer, suffix: str, separator: str | None
) -> Iterator[np.ndarray | None]:
  """The tokens of one document after another, without `end`; None where nothing lies between two separators.

  Arguments and errors as for `load`. One document, and `BLOCK` bytes, are held at once.
  """
  for file in files_of(root, suffix):
    for part in _parts(file, separator):
      try:
        yield None if separator is not None and not part else tokenizer.encode(part)
      except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def pack(
  documents: Sequence[Sequence[int] | np.ndarray],
  *,
  length: int,
  tokenizer: Tokenizer = BYTES,
  name: str = "text",
) -> Source:
  """Rows of `length` tokens; the last one is filled up with `end`.

  Args:
    documents: the tokens of each, without `end`. An empty one is `end` alone, predicted to end.
    length: tokens in a row, at least 2.
    tokenizer: whose tokens they are.
    name: of the source.

  Returns:
    A `Source` with, per row and place [rows, length], int32:
      tokens: what the model sees.
      label: the document's next token, also where it stands in the next row; `UNLABELED` where the row is filled up.
      segments: the number of the document; -1 where the row is filled up.
      positions: in the part of the document that lies in this row, from 0.
    Ids number the rows: they change with the documents, the tokenizer and the length. `vocabulary` is the tokenizer's
    identity, so that a cache of what a teacher said of other tokens is refused.

  Raises:
    ValueError: no documents, length < 2, or a token outside the vocabulary.
  """
  if length < 2:
    raise ValueError(f"length must be at least 2, got {length}")
  if not len(documents):
    raise ValueError("there are no documents to pack")
  sizes = np.array([len(document) + 1 for document in documents])
  tokens = np.full(sizes.sum(), tokenizer.end, np.int32)
  labels, starts = tokens.copy(), np.cumsum(sizes) - sizes
  for number, (start, document) in enumerate(zip(starts, documents)):
    check_document(document, tokenizer.size, number)
    tokens[start + 1 : start + 1 + len(document)] = labels[start : start + len(document)] = document
  segments = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
  # A document begins where it begins, or where the row does.
  places = np.arange(len(tokens))
  positions = places - np.maximum(np.repeat(starts, sizes), places // length * length)
  fills = {"tokens": tokenizer.end, "label": UNLABELED, "segments": -1, "positions": 0}
  arrays = {
    key: _rows(values, length, fills[key])
    for key, values in {
      "tokens": tokens,
      "label": labels,
      "segments": segments,
      "positions": positions,
    }.items()
  }
  return Source(
    arrays, tokenizer.size, name=name, ignore_label=UNLABELED, vocabulary=tokenizer.identity
  )


def check_same(teacher: Tokenizer, student: Tokenizer) -> None:
  """Refuses tokenizers that differ: a token of the one is then none of the other.

  Raises:
    ValueError: they do; `losses.uld` compares distributions over different vocabularies.
  """
  if teacher.identity != student.identity:
    raise ValueError(
      f"tokenizers: the teacher's is {teacher.identity!r} ({teacher.size:,} tokens), the student's "
      f"{student.identity!r} ({student.size:,} tokens): probabilities can be compared token by token only where both "
      "read with the same one; losses.uld compares sorted ones and needs no equal vocabularies"
    )


def train_bpe(path: str | Path, *, size: int, suffix: str = ".txt"):
  """A byte-level BPE (Sennrich et al. 2016, GPT-2's bytes) trained on the text files of `load`.

  Args:
    path: a file or a folder, as in `load`.
    size: of the vocabulary, with `end` as token 0; at least 257.
    suffix: as in `load`.

  Returns:
    A `tokenizers.Tokenizer`: `.save("tokenizer.json")` keeps it, `bpe` makes a `Tokenizer` of it.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    ValueError: size < 257, no files, or a file that is not UTF-8.
  """
  import tokenizers  # optional: bytes need no package

  if size < 257:
    raise ValueError(f"size must be at least 257, all bytes and the end, got {size}")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(
    (_utf8(file.read_bytes(), f"{file}: ") for file in files_of(Path(path), suffix)), trainer
  )
  return made


def bpe(source, *, end: str = END) -> Tokenizer:
  """A `Tokenizer` from one of the package `tokenizers`, or from its tokenizer.json (a released model's too).

  Args:
    source: a `tokenizers.Tokenizer`, or a path.
    end: its entry that ends documents, such as '<|end_of_text|>' for Llama 3.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    ValueError: there is no such entry, or a file that is no tokenizer.
  """
  import tokenizers  # optional: bytes need no package

  given = source.to_str() if isinstance(source, tokenizers.Tokenizer) else Path(source).read_text()
  try:
    made = tokenizers.Tokenizer.from_str(given)
  except Exception as error:  # the Rust parser raises a bare Exception
    raise ValueError(f"{source} is no tokenizer.json: {error}") from error
  # Whole documents, in which the name of `end` is text.
  made.no_truncation()
  made.no_padding()
  made.encode_special_tokens = True
  last = made.token_to_id(end)
  if last is None:
    raise ValueError(f"the tokenizer has no entry {end!r}: give end=")

  def encode(text: bytes) -> np.ndarray:
    return np.array(made.encode(_utf8(text), add_special_tokens=False).ids, np.int32)

  def decode(tokens: Iterable[int]) -> str:
    return made.decode(list(map(int, tokens)), skip_special_tokens=False)

  identity = hashlib.blake2b(made.to_str().encode(), digest_size=8).hexdigest()
  return Tokenizer(encode, decode, made.get_vocab_size(), last, f"bpe:{identity}")


def files_of(root: Path, suffix: str) -> list[Path]:
  """A file, or those of a folder, at any depth, in the order of their paths; errors as for `load`."""
  if root.is_file():
    return [root]
  if not root.is_dir():
    raise FileNotFoundError(f"there is no file or folder {root}")
  found = sorted(file for file in root.rglob(f"*{suffix}") if file.is_file())
  if not found:
    raise ValueError(f"{root} has no files that end in {suffix}")
  return found


def _utf8(text: bytes, prefix: str = "") -> str:
  try:
    return text.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{prefix}byte {error.start} is not UTF-8 ({error.reason}); BYTES reads any file"
    ) from error


def _parts(file: Path, separator: str | None) -> Iterator[bytes]:
  """What lies between separators; without one the whole file."""
  if separator is None:
    yield file.read_bytes()
    return
  rest, mark = b"", separator.encode()
  with open(file, "rb") as opened:
    while block := opened.read(BLOCK):
      *parts, rest = (rest + block).split(mark)
      yield from parts
  yield rest


def check_document(document, size: int, number: int) -> None:
  """Raises ValueError for tokens outside a vocabulary; the document is named by its number."""
  values = np.asarray(document)
  if values.size and not (
    np.issubdtype(values.dtype, np.integer) and 0 <= values.min() and values.max() < size
  ):
    raise ValueError(f"document {number} has tokens that are no integers in [0, {size - 1}]")


def _rows(values: np.ndarray, length: int, fill: int) -> np.ndarray:
  rows = -(-len(values) // length)
  return np.pad(values, (0, rows * length - len(values)), constant_values=fill).reshape(
    rows, length
  )
