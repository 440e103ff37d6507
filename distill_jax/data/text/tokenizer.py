"""Defines what a tokenizer is, and the one whose tokens are bytes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np


class Tokenizer(NamedTuple):
  """A pair of functions, text to tokens and back, with the size of their vocabulary.

  Attributes:
    encode: a document's bytes -> its tokens, int [N], without `end`. Raises ValueError for bytes it
      cannot read.
    decode: tokens -> text; `end` and broken UTF-8 become replacement characters.
    size: number of tokens in the vocabulary.
    end: the token that begins and ends documents.
    identity: equal for equal vocabularies, and for these only.

  >>> from distill_jax.data import text
  >>> text.BYTES.encode(b"or"), text.BYTES.decode([111, 114]), text.BYTES.size
  (array([111, 114], dtype=uint8), 'or', 257)
  """

  encode: Callable[[bytes], np.ndarray]
  decode: Callable[[Iterable[int]], str]
  size: int
  end: int
  identity: str


class Vocabulary(Protocol):
  """What any tokenizer says of its vocabulary: `Tokenizer`, `SequenceTokenizer` and others."""

  @property
  def size(self) -> int: ...

  @property
  def identity(self) -> str: ...


def check_same_tokenizer(teacher: Vocabulary, student: Vocabulary) -> None:
  """Checks that teacher and student read the same tokens.

  Args:
    teacher: the teacher's `Tokenizer`, `SentenceTokenizer` or `SequenceTokenizer`.
    student: the student's.

  Raises:
    ValueError: their identities differ; `losses.uld` compares distributions over different
      vocabularies, and sequence-level distillation trains on the teacher's decoded texts.

  >>> from distill_jax.data import text
  >>> text.check_same_tokenizer(text.BYTES, text.BYTES)
  >>> other = text.BYTES._replace(size=258, identity="bytes and a mask")
  >>> text.check_same_tokenizer(text.BYTES, other)  # doctest: +IGNORE_EXCEPTION_DETAIL
  Traceback (most recent call last):
  ValueError: tokenizer: expected the teacher's, 'bytes' (257 tokens), got ...
  """
  if teacher.identity != student.identity:
    raise ValueError(
      f"tokenizer: expected the teacher's, {teacher.identity!r} ({teacher.size:,} tokens), got "
      f"{student.identity!r} ({student.size:,} tokens): use one tokenizer for both; or losses.uld, "
      "which compares sorted probabilities; or sequence-level distillation, which encodes the "
      "teacher's decoded texts by the student's tokenizer"
    )


def _bytes_to_text(tokens: Iterable[int]) -> str:
  parts = (bytes([t]) if t < 256 else "\ufffd".encode() for t in tokens)
  return b"".join(parts).decode(errors="replace")


BYTES = Tokenizer(lambda text: np.frombuffer(text, np.uint8), _bytes_to_text, 257, 256, "bytes")
"""Every byte is a token, and 256 is `end`: any file can be read, nothing has to be trained."""
