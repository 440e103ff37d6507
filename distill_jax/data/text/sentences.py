"""Turns sentences and pairs of them into rows of tokens for encoders, with the package
`tokenizers`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.text.bpe import parsed_tokenizer, tokenizer_digest
from distill_jax.errors import check_integer
from distill_jax.storage import files, folders

_PADDINGS = ("[PAD]", "<pad>")
_SPECIAL = ("[CLS]", "[SEP]", "[UNK]", "[PAD]")


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceTokenizer:
  """Sentences to rows of tokens, as a released encoder reads them; `sentence_tokenizer` makes it.

  Attributes:
    tokenizer: the `tokenizers.Tokenizer`.
    size: number of tokens in the vocabulary; the encoder's `vocab_size` must be as large.
    pad: the token that fills rows up.
    identity: equal for equal tokenizers, and for these only: the `vocabulary` of a `Source`.

  Example in `sentence_tokenizer`.
  """

  tokenizer: Any = dataclasses.field(repr=False)
  size: int
  pad: int
  identity: str

  def rows(
    self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, length: int
  ) -> dict[str, np.ndarray]:
    """Returns texts, or pairs of them, as rows of `length` tokens, of which the last are padding.

    Args:
      texts: the first, or only, sentence of each row.
      pairs: the second ones, of token type 1; None: there are none.
      length: tokens in a row, with the special ones. A longer text is cut, of a pair the longer of
        both, token by token.

    Returns:
      Arrays int32 [N, length], the inputs of an `Encoder` and entries of a `data.Source`: 'tokens',
      'segments' (0, and -1 for padding) and 'token_types'.

    Raises:
      ValueError: no texts, an empty one, what is no text, as many pairs as there are no texts, or a
        length that leaves no room for text.
    """
    _check_texts("texts", texts)
    if pairs is not None:
      _check_texts("pairs", pairs)
      if len(pairs) != len(texts):
        raise ValueError(f"pairs: expected one for each of {len(texts)} texts, got {len(pairs)}")
    items = list(texts) if pairs is None else list(zip(texts, pairs))
    return self._to_rows(self._encode(items, length, pairs is not None), length)

  def word_rows(
    self,
    words: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]] | None = None,
    *,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns sentences that are split into words as `rows`, with the label of each word.

    Args:
      words: the words of each sentence.
      labels: class numbers of the words; None: there are none.
      length: as in `rows`. The labels of words that are cut are left out.

    Returns:
      The arrays of `rows`; and 'label', int32 [N, length]: a word's label at the first of its
      tokens, `UNLABELED` at its other tokens, special ones and padding.

    Raises:
      ValueError: as `rows`, or another number of labels than of words.
    """
    _check_texts("words", [" ".join(sentence) for sentence in words])
    encodings = self._encode([list(sentence) for sentence in words], length, False, is_split=True)
    arrays = self._to_rows(encodings, length)
    if labels is None:
      return arrays
    if len(labels) != len(words):
      raise ValueError(
        f"labels: expected one list for each of {len(words)} sentences, got {len(labels)}"
      )
    label = np.full_like(arrays["tokens"], UNLABELED)
    for row, (encoding, values) in enumerate(zip(encodings, labels)):
      if len(values) != len(words[row]):
        raise ValueError(
          f"labels: expected one for each of {len(words[row])} words in row {row}, got "
          f"{len(values)}"
        )
      numbers = np.array([-1 if n is None else n for n in encoding.word_ids])
      is_first = (numbers >= 0) & (np.diff(numbers, prepend=-1) != 0)
      label[row, : len(numbers)][is_first] = np.asarray(values)[numbers[is_first]]
    return arrays | {"label": label}

  def _encode(self, items: list, length: int, is_pair: bool, is_split: bool = False) -> list:
    special = self.tokenizer.num_special_tokens_to_add(is_pair)
    check_integer("length", length, special + 1 + is_pair)
    self.tokenizer.enable_truncation(length)
    return self.tokenizer.encode_batch(items, is_pretokenized=is_split)

  def _to_rows(self, encodings: list, length: int) -> dict[str, np.ndarray]:
    shape = (len(encodings), length)
    arrays = {
      "tokens": np.full(shape, self.pad, np.int32),
      "segments": np.full(shape, -1, np.int32),
      "token_types": np.zeros(shape, np.int32),
    }
    for row, encoding in enumerate(encodings):
      count = len(encoding.ids)
      arrays["tokens"][row, :count] = encoding.ids
      arrays["segments"][row, :count] = 0
      arrays["token_types"][row, :count] = encoding.type_ids
    return arrays


def sentence_tokenizer(source: Any, *, lowercase: bool = True) -> SentenceTokenizer:
  """Returns the tokenizer of a released encoder: of BERT's vocab.txt, or any tokenizer.json.

  Args:
    source: a tokenizer.json or a vocab.txt, a folder with one of them (tokenizer.json first), or a
      `tokenizers.Tokenizer` that adds the special tokens.
    lowercase: whether a vocab.txt is of lower-cased text without accents; a tokenizer.json says so
      itself.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    FileNotFoundError: there is no such file.
    ValueError: the file is no tokenizer, or it has no token for padding.

  >>> import pathlib, tempfile
  >>> from distill_jax import data
  >>> from distill_jax.data import text
  >>> path = pathlib.Path(tempfile.mkdtemp(), "vocab.txt")
  >>> vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "sat", "##s"]
  >>> path.write_text("\\n".join(vocabulary))
  37
  >>> tokenizer = text.sentence_tokenizer(path)
  >>> rows = tokenizer.rows(["A cat sat", "Cats!"], length=6)
  >>> rows["tokens"]
  array([[2, 4, 5, 6, 3, 0],
         [2, 5, 7, 1, 3, 0]], dtype=int32)
  >>> source = data.Source(rows, vocabulary=tokenizer.identity)
  """
  import tokenizers

  if isinstance(source, tokenizers.Tokenizer):
    content = source.to_str()
  else:
    path = _path(source)
    content = _decode(files.read(path), path)
    if path.suffix == ".txt":
      content = _wordpiece(content, path, lowercase).to_str()
  tokenizer = parsed_tokenizer(content, source)
  pad = next((i for i in map(tokenizer.token_to_id, _PADDINGS) if i is not None), None)
  if pad is None:
    raise ValueError(f"source: expected a token for padding, one of {_PADDINGS}, got none")
  identity = f"sentences:{tokenizer_digest(tokenizer)}"
  return SentenceTokenizer(tokenizer, tokenizer.get_vocab_size(), pad, identity)


def _path(source: str | os.PathLike) -> Path:
  path = folders.resolve(source, "source")
  if path.is_dir():
    found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
    if not found:
      raise FileNotFoundError(
        f"source: expected tokenizer.json or vocab.txt in {path}, got neither"
      )
    return found[0]
  return path


def _decode(content: bytes, path: Path) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"source: expected UTF-8 in {path}, got another byte at {error.start}"
    ) from error


def _wordpiece(content: str, path: Path, lowercase: bool):
  """Returns BERT's tokenizer of a vocabulary, one token a line."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

  vocabulary = {token: number for number, token in enumerate(content.splitlines())}
  missing = [token for token in _SPECIAL if token not in vocabulary]
  if missing:
    raise ValueError(f"source: expected the tokens {_SPECIAL} in {path}, got none for {missing}")
  tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[(token, vocabulary[token]) for token in _SPECIAL[:2]],
  )
  tokenizer.add_special_tokens([token for token in (*_SPECIAL, "[MASK]") if token in vocabulary])
  return tokenizer


def _check_texts(name: str, texts: Sequence[str]) -> None:
  if isinstance(texts, str) or not len(texts):
    got = f"one text, {texts[:20]!r}" if isinstance(texts, str) and texts else "none"
    raise ValueError(f"{name}: expected a list of texts, got {got}")
  for row, text in enumerate(texts):
    if not isinstance(text, str):
      raise ValueError(f"{name}: expected text in row {row}, got {type(text).__name__}")
    if not text.strip():
      raise ValueError(f"{name}: expected text in row {row}, got none: leave this row out")
