"""Trains and loads byte-pair encodings, with the optional package `tokenizers`."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data.text.documents import list_files
from distill_jax.data.text.tokenizer import Tokenizer
from distill_jax.storage import files, folders

END = "<|end|>"


def train_bpe(path: str | Path, *, size: int, suffix: str = ".txt") -> Any:
  """Trains a byte-level BPE (Sennrich et al. 2016, GPT-2's bytes) on the text files of `load`.

  Args:
    path: a file or a folder, as in `load`.
    size: number of tokens, with `end` as token 0; at least 257.
    suffix: ending of the files of a folder to read.

  Returns:
    A `tokenizers.Tokenizer`: `.save("tokenizer.json")` stores it, `bpe` makes a `Tokenizer` of it.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    ValueError: size < 257, no files, or a file that is not UTF-8.

  >>> import pathlib, tempfile
  >>> from distill_jax.data import text
  >>> path = pathlib.Path(tempfile.mkdtemp(), "corpus.txt")
  >>> path.write_text("to be or not to be " * 20)
  380
  >>> tokenizer = text.train_bpe(path, size=262)
  >>> len(tokenizer.encode("to be or not").ids)  # of 12 bytes
  8
  """
  import tokenizers

  if size < 257:
    raise ValueError(f"size: expected at least 257, all bytes and the end, got {size}")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[END],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  paths = list_files(folders.resolve(path, "path"), suffix)
  texts = (_decode_utf8(file.read_bytes(), f"{file}: ") for file in paths)
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def bpe(source: Any, *, end: str = END) -> Tokenizer:
  """Returns a `Tokenizer` from one of the package `tokenizers` or from a (released) tokenizer.json.

  Args:
    source: a `tokenizers.Tokenizer`, or a path.
    end: its entry that ends documents, such as '<|end_of_text|>' for Llama 3.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    ValueError: there is no such entry, or the file is no tokenizer.

  >>> import pathlib, tempfile
  >>> from distill_jax.data import text
  >>> path = pathlib.Path(tempfile.mkdtemp(), "corpus.txt")
  >>> path.write_text("to be or not to be " * 20)
  380
  >>> tokenizer = text.bpe(text.train_bpe(path, size=262))  # or the path of a tokenizer.json
  >>> tokenizer.size, tokenizer.decode(tokenizer.encode(b"to be"))
  (262, 'to be')
  """
  import tokenizers

  if isinstance(source, tokenizers.Tokenizer):
    text = source.to_str()
  else:
    text = _decode_utf8(files.read(folders.resolve(source, "source")), f"{source}: ")
  # Documents are encoded in full, and the name of `end` in a document is text.
  tokenizer = parsed_tokenizer(text, source)
  end_token = tokenizer.token_to_id(end)
  if end_token is None:
    raise ValueError(
      f"end: expected an entry of the tokenizer, got {end!r}: name the one that ends documents"
    )

  def encode(text: bytes) -> np.ndarray:
    return np.array(tokenizer.encode(_decode_utf8(text), add_special_tokens=False).ids, np.int32)

  def decode(tokens: Iterable[int]) -> str:
    return tokenizer.decode(list(map(int, tokens)), skip_special_tokens=False)

  identity = f"bpe:{tokenizer_digest(tokenizer)}"
  return Tokenizer(encode, decode, tokenizer.get_vocab_size(), end_token, identity)


def parsed_tokenizer(text: str, source: Any) -> Any:
  """Returns the `tokenizers.Tokenizer` of a tokenizer.json, which neither pads nor cuts; the names
  of special tokens in a text are text.

  Args:
    text: the content.
    source: where it is from, for the message.

  Raises:
    ValueError: it is no tokenizer.
  """
  import tokenizers

  try:
    tokenizer = tokenizers.Tokenizer.from_str(text)
  # The Rust parser raises a bare Exception.
  except Exception as error:
    raise ValueError(f"source: expected a tokenizer.json, got {source}: {error}") from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True
  return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
  """Returns a hash that is equal for equal tokenizers of the package `tokenizers`."""
  return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=8).hexdigest()


def _decode_utf8(text: bytes, prefix: str = "") -> str:
  try:
    return text.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{prefix}expected UTF-8, got another byte at {error.start} ({error.reason}): text.BYTES "
      "reads any file"
    ) from error
