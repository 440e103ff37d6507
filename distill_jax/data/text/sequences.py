"""Encodes the sources and targets of sequence-to-sequence networks: texts, or symbols."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data.text.bpe import parsed_tokenizer, tokenizer_digest
from distill_jax.errors import check_integer, suggest
from distill_jax.storage import files, folders

START, STOP, PAD = "<s>", "</s>", "<pad>"
"""The names of the special tokens, unless others are given."""
_BYTES = 256


class SequenceTokenizer(NamedTuple):
  """A pair of functions, sequence to tokens and back, with the special tokens of a decoder.

  Attributes:
    encode: a text, or the symbols of a sequence -> its tokens, int32 [N], without special ones.
    decode: tokens -> a text, or a tuple of symbols; stops at the first `end`, and leaves out
      `start` and `pad`. Raises ValueError for tokens outside of the vocabulary.
    size: number of tokens in the vocabulary, with the special ones.
    start: the decoder's first input.
    end: the token after the last one of a target.
    pad: the token that fills rows up.
    identity: equal for equal vocabularies, and for these only: the `vocabulary` of a `Source`.

  >>> from distill_jax.data import text
  >>> text.symbol_tokenizer("ab")  # doctest: +ELLIPSIS
  SequenceTokenizer(encode=..., size=5, start=3, end=4, pad=2, identity='symbols:...')
  """

  encode: Callable[[Any], np.ndarray]
  decode: Callable[[Iterable[int]], Any]
  size: int
  start: int
  end: int
  pad: int
  identity: str


def train_pair_bpe(texts: Iterable[str], *, size: int) -> Any:
  """Trains a byte-level BPE (Sennrich et al. 2016) that sources and targets share.

  A text's first word has the same tokens as it has within a text: a space is put in front.

  Args:
    texts: those of both sides; of the training split only.
    size: number of tokens, with `<pad>`, `<s>` and `</s>` as tokens 0 to 2; at least 259.

  Returns:
    A `tokenizers.Tokenizer`: `.save("tokenizer.json")` stores it, `sequence_tokenizer` takes it.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    ValueError: size < 259, a single text, or none.

  >>> from distill_jax.data import text
  >>> tokenizer = text.train_pair_bpe(["the table", "le tableau"], size=264)
  >>> tokenizer.encode(" tab").tokens == tokenizer.encode("tab").tokens
  True
  """
  import tokenizers

  check_integer("size", size, _BYTES + 3)
  if isinstance(texts, str):
    raise ValueError("texts: expected an iterable of texts, got one text: put it into a list")
  texts = list(texts)
  if not texts:
    raise ValueError("texts: expected texts of both sides, got none")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[PAD, START, STOP],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def sequence_tokenizer(
  source: Any, *, start: str = START, end: str = STOP, pad: str = PAD
) -> SequenceTokenizer:
  """Returns the tokenizer of texts from one of the package `tokenizers`, or a tokenizer.json.

  Texts are decoded as they were, but for white space at their ends.

  Args:
    source: a `tokenizers.Tokenizer`, such as of `train_pair_bpe`, or a path.
    start: its entry that the decoder reads first; '<pad>' for T5 and Marian.
    end: its entry that ends targets.
    pad: its entry that fills rows up.

  Raises:
    ImportError: the package `tokenizers` is not installed.
    ValueError: there is no such entry, or the file is no tokenizer.

  >>> from distill_jax.data import text
  >>> bpe = text.train_pair_bpe(["the table", "le tableau", "the tables"], size=270)
  >>> tokenizer = text.sequence_tokenizer(bpe)
  >>> tokens = tokenizer.encode("the tableau")
  >>> len(tokens), tokenizer.decode([tokenizer.start, *tokens, tokenizer.end, tokenizer.end])
  (2, 'the tableau')
  """
  import tokenizers

  if isinstance(source, tokenizers.Tokenizer):
    content = source.to_str()
  else:
    content = files.read(folders.resolve(source, "source")).decode("utf-8", "replace")
  tokenizer = parsed_tokenizer(content, source)
  names = {"start": start, "end": end, "pad": pad}
  special = {field: tokenizer.token_to_id(name) for field, name in names.items()}
  for field, token in special.items():
    if token is None:
      raise ValueError(f"{field}: expected an entry of the tokenizer, got {names[field]!r}")
  size = tokenizer.get_vocab_size()

  def encode(text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text.strip(), add_special_tokens=False).ids, np.int32)

  def decode(tokens: Iterable[int]) -> str:
    ids = _plain_tokens(tokens, size, **special)
    return tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" ")

  identity = f"sequences:{tokenizer_digest(tokenizer)}:{tuple(special.values())}"
  return SequenceTokenizer(encode, decode, size, identity=identity, **special)


def symbol_tokenizer(
  symbols: Sequence[str], *, start: str = START, end: str = STOP, pad: str = PAD
) -> SequenceTokenizer:
  """Returns the tokenizer of sequences of symbols, such as letters or phones, each one token.

  Args:
    symbols: the vocabulary; a symbol's token is its position. Special ones that are not in it
      follow it.
    start: the symbol that the decoder reads first.
    end: the symbol that ends targets.
    pad: the symbol that fills rows up.

  Returns:
    A tokenizer whose `encode` takes a string of letters, or a sequence of symbols, and raises a
    ValueError for others.

  Raises:
    ValueError: there are no symbols, or one repeats.

  >>> from distill_jax.data import text
  >>> letters = text.symbol_tokenizer("abc")
  >>> letters.encode("cab"), letters.decode([2, 0, 1, letters.end]), letters.size
  (array([2, 0, 1], dtype=int32), ('c', 'a', 'b'), 6)
  """
  if not len(symbols):
    raise ValueError("symbols: expected a vocabulary such as 'abc', got none")
  names = [*symbols, *(x for x in dict.fromkeys((pad, start, end)) if x not in symbols)]
  tokens = {name: token for token, name in enumerate(names)}
  if len(tokens) != len(names):
    repeated = next(name for token, name in enumerate(names) if tokens[name] != token)
    raise ValueError(f"symbols: expected each once, got {repeated!r} twice")
  special = {"start": tokens[start], "end": tokens[end], "pad": tokens[pad]}

  def encode(sequence: Sequence[str]) -> np.ndarray:
    for symbol in sequence:
      if symbol not in tokens:
        raise ValueError(
          f"sequence: expected symbols of the vocabulary, got {symbol!r}{suggest(symbol, names)}"
        )
    return np.array([tokens[symbol] for symbol in sequence], np.int32)

  def decode(ids: Iterable[int]) -> tuple[str, ...]:
    return tuple(names[i] for i in _plain_tokens(ids, len(names), **special))

  digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).hexdigest()
  identity = f"symbols:{digest}:{tuple(special.values())}"
  return SequenceTokenizer(encode, decode, len(names), identity=identity, **special)


def _plain_tokens(tokens: Iterable[int], size: int, start: int, end: int, pad: int) -> list[int]:
  """Returns the tokens before the first `end`, without `start` and `pad`."""
  plain = []
  for token in map(int, tokens):
    if not 0 <= token < size:
      raise ValueError(f"tokens: expected integers in [0, {size - 1}], got {token}")
    if token == end:
      break
    if token not in (start, pad):
      plain.append(token)
  return plain
