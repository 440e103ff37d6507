"""Turns pairs of sequences into rows for encoder-decoder networks, and checks such rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.data.checks import example_name
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.text.sequences import SequenceTokenizer
from distill_jax.errors import check_integer

Tokens = Sequence[int] | np.ndarray


def pair_source(
  sources: Sequence[Any],
  targets: Sequence[Any],
  tokenizer: SequenceTokenizer,
  *,
  source_length: int,
  target_length: int,
  source_tokenizer: SequenceTokenizer | None = None,
  drop_longer: bool = False,
  name: str = "pairs",
) -> Source:
  """Encodes pairs of texts, or of sequences of symbols, into a source for `tasks.translation`.

  Args:
    sources: what the encoder reads, as the tokenizer's `encode` takes it.
    targets: what the decoder writes, one for each source.
    tokenizer: encodes the targets, whose tokens are the classes, and the sources too unless they
      have a tokenizer of their own.
    source_length: tokens in a row of sources, with their end token.
    target_length: tokens in a row of targets, with their end token.
    source_tokenizer: encodes the sources.
    drop_longer: whether pairs that are longer are left out, and their number printed; they raise
      otherwise.
    name: name of the source.

  Returns:
    A `Source` of the arrays of `pair_rows`, where the tokenizer's end token ends each source. An id
    is the pair's index in `sources`.

  Raises:
    ValueError: as `pair_rows`, or all pairs are too long.

  >>> from distill_jax.data import text
  >>> letters, phones = text.symbol_tokenizer("act"), text.symbol_tokenizer(["AE1", "K", "T"])
  >>> source = text.pair_source(
  ...   ["cat", "act"],
  ...   [("K", "AE1", "T"), ("AE1", "K", "T")],
  ...   phones,
  ...   source_tokenizer=letters,
  ...   source_length=4,
  ...   target_length=5,
  ... )
  >>> source.arrays["source"][0], source.arrays["label"][0], source.classes
  (array([1, 0, 2, 5], dtype=int32), array([ 1,  0,  2,  5, -1], dtype=int32), 6)
  """
  source_tokenizer = source_tokenizer or tokenizer
  source_tokens = [source_tokenizer.encode(sequence) for sequence in sources]
  target_tokens = [tokenizer.encode(sequence) for sequence in targets]
  ids = np.arange(len(source_tokens))
  if drop_longer:
    lengths = source_length - 1, target_length - 1
    ids = _short_ids(source_tokens, target_tokens, *lengths)
    source_tokens = [source_tokens[i] for i in ids]
    target_tokens = [target_tokens[i] for i in ids]
  arrays = pair_rows(
    source_tokens,
    target_tokens,
    source_length=source_length,
    target_length=target_length,
    start=tokenizer.start,
    end=tokenizer.end,
    pad=tokenizer.pad,
    source_end=source_tokenizer.end,
    source_pad=source_tokenizer.pad,
    source_size=source_tokenizer.size,
    target_size=tokenizer.size,
  )
  return Source(
    {"id": ids, **arrays},
    tokenizer.size,
    name=name,
    ignore_label=UNLABELED,
    vocabulary=tokenizer.identity,
  )


def pair_rows(
  sources: Sequence[Tokens],
  targets: Sequence[Tokens],
  *,
  source_length: int,
  target_length: int,
  start: int,
  end: int,
  pad: int = 0,
  source_end: int | None = None,
  source_pad: int | None = None,
  source_size: int | None = None,
  target_size: int | None = None,
) -> dict[str, np.ndarray]:
  """Returns pairs of token sequences as rows for an encoder-decoder network.

  Args:
    sources: tokens that the encoder reads, without special ones.
    targets: tokens that the decoder writes, without special ones.
    source_length: tokens in a row of sources, S, with `source_end` if there is one.
    target_length: tokens in a row of targets, T, with the end token.
    start: the decoder's first input.
    end: the token after the last one of a target.
    pad: fills rows up.
    source_end: the token after the last one of a source; None: there is none.
    source_pad: fills rows of sources up; None: `pad`.
    source_size: number of tokens in the vocabulary of the sources; None: it is not checked.
    target_size: number of tokens in the vocabulary of the targets; None: it is not checked.

  Returns:
    int32 arrays, entries of a `data.Source`:

    - `source` [N, S] and `source_segments` [N, S], 0 for tokens and -1 for padding.
    - `tokens` [N, T], the decoder's inputs: the start token and the target.
    - `label` [N, T]: the target and the end token; `UNLABELED` at padding.

  Raises:
    ValueError: no pairs, other numbers of sources and targets, an empty sequence, one that is too
      long, a token outside of its vocabulary, a target that begins with the start token or has the
      end token, which are added here. The error names the row.

  >>> from distill_jax.data import text
  >>> rows = text.pair_rows([[5, 6]], [[7]], source_length=3, target_length=3, start=1, end=2)
  >>> {name: values[0].tolist() for name, values in rows.items()}
  {'source': [5, 6, 0], 'source_segments': [0, 0, -1], 'tokens': [1, 7, 0], 'label': [7, 2, -1]}
  """
  check_integer("source_length", source_length, 1)
  check_integer("target_length", target_length, 2)
  if len(sources) != len(targets):
    raise ValueError(
      f"targets: expected one for each of {len(sources)} sources, got {len(targets)}"
    )
  if not len(sources):
    raise ValueError("sources: expected at least one, got none")
  source_ends = [] if source_end is None else [source_end]
  _check_sequences("source", sources, source_length - len(source_ends), source_size)
  _check_sequences("target", targets, target_length - 1, target_size)
  _check_no_special(targets, start, end)
  source_fill = pad if source_pad is None else source_pad
  rows = [[*tokens, *source_ends] for tokens in sources]
  segments = [np.zeros(len(row), np.int32) for row in rows]
  return {
    "source": _filled(rows, source_length, source_fill),
    "source_segments": _filled(segments, source_length, -1),
    "tokens": _filled([[start, *tokens] for tokens in targets], target_length, pad),
    "label": _filled([[*tokens, end] for tokens in targets], target_length, UNLABELED),
  }


def check_pairs(arrays: Mapping[str, np.ndarray], *, start: int, end: int) -> None:
  """Checks rows of an encoder-decoder network that were made elsewhere.

  Args:
    arrays: has 'source', 'source_segments', 'tokens' and 'label', as of `pair_rows`, and maybe
      'id', which errors name then.
    start: the token that 'tokens' must begin with.
    end: the token that the labels must end with.

  Raises:
    ValueError: an entry is missing or of another shape, 'source_segments' are a mask, a source is
      empty or not a row's first tokens, 'tokens' do not begin with the start token, the labels do
      not end with the end token, or the tokens after the start token are others than the labels
      before the end token.

  >>> from distill_jax.data import text
  >>> rows = text.pair_rows([[5, 6]], [[7]], source_length=3, target_length=3, start=1, end=2)
  >>> text.check_pairs(rows, start=1, end=2)
  """
  missing = [x for x in ("source", "source_segments", "tokens", "label") if x not in arrays]
  if missing:
    raise ValueError(f"{missing[0]}: expected an entry of pairs, got only {sorted(arrays)}")
  shapes = {name: np.shape(arrays[name]) for name in arrays}
  for name, other in (("source_segments", "source"), ("label", "tokens")):
    if shapes[name] != shapes[other] or len(shapes[name]) != 2:
      raise ValueError(
        f"{name}: expected the shape [rows, length] of {other}, got {list(shapes[name])} for "
        f"{list(shapes[other])}"
      )
  ids = arrays.get("id")
  segments = np.asarray(arrays["source_segments"])
  # A mask has no negative number: its padding would be read.
  if segments.dtype.kind != "i" or (segments > 0).any():
    got = segments.max() if segments.dtype.kind == "i" else segments.dtype
    raise ValueError(
      f"source_segments: expected integers, 0 for tokens and negative for padding, got {got}: of a "
      "mask write np.where(mask, 0, -1)"
    )
  _check_padding_last("source_segments", segments >= 0, ids)
  label = np.asarray(arrays["label"])
  tokens = np.asarray(arrays["tokens"])
  is_label = label >= 0
  _check_padding_last("label", is_label, ids)
  last = label[np.arange(len(label)), is_label.sum(1) - 1]
  # An input is the label before it.
  is_shifted = np.where(is_label[:, 1:], tokens[:, 1:] == label[:, :-1], True).all(1)
  checks = {
    f"tokens: expected the start token {start} first": tokens[:, 0] == start,
    f"label: expected the end token {end} last": last == end,
    "tokens: expected the labels of the positions before, after the start token": is_shifted,
  }
  for message, is_valid in checks.items():
    if not is_valid.all():
      row = int(np.argmin(is_valid))
      raise ValueError(
        f"{message}, got {tokens[row].tolist()} with labels {label[row].tolist()} in "
        f"{example_name(ids, row)}: make the rows by text.pair_rows"
      )


def _short_ids(sources, targets, source_length: int, target_length: int) -> np.ndarray:
  """Returns the indices of the pairs that fit, and prints how many are left out."""
  is_long = np.array(
    [[len(a) > source_length, len(b) > target_length] for a, b in zip(sources, targets)], bool
  ).reshape(-1, 2)
  ids = np.flatnonzero(~is_long.any(1))
  if len(is_long) and not len(ids):
    raise ValueError(
      f"target_length: expected lengths for some pairs, got sources of more than {source_length} "
      f"or targets of more than {target_length} tokens in all of {len(is_long)}"
    )
  print(
    f"pairs: left out {len(is_long) - len(ids):,} of {len(is_long):,}: {is_long[:, 0].sum():,} "
    f"with sources of more than {source_length} tokens, {is_long[:, 1].sum():,} with targets of "
    f"more than {target_length}",
    flush=True,
  )
  return ids


def _check_sequences(field: str, sequences, longest: int, size: int | None) -> None:
  for row, tokens in enumerate(sequences):
    values = np.asarray(tokens)
    if not values.size:
      raise ValueError(f"{field}s: expected tokens in row {row}, got none: leave this pair out")
    if values.size > longest:
      raise ValueError(
        f"{field}_length: expected room for row {row}, got {values.size} tokens for {longest} "
        "without special ones: raise it, or leave longer pairs out by "
        "text.pair_source(drop_longer=True)"
      )
    is_integer = np.issubdtype(values.dtype, np.integer)
    if not is_integer or values.min() < 0 or (size is not None and values.max() >= size):
      most = "" if size is None else f" and less than {size}"
      raise ValueError(
        f"{field}s: expected tokens that are integers >= 0{most}, got {values.tolist()} in row "
        f"{row}: encode them by the tokenizer of the network"
      )


def _check_no_special(targets, start: int, end: int) -> None:
  for row, tokens in enumerate(targets):
    if tokens[0] == start:
      raise ValueError(
        f"targets: expected no start token {start}, which is added, got it first in row {row}: "
        "leave it out"
      )
    if end in tokens:
      raise ValueError(
        f"targets: expected no end token {end}, which is added, got it in row {row}: leave it out"
      )


def _check_padding_last(name: str, is_token: np.ndarray, ids: Any) -> None:
  """Raises unless each row has tokens, and padding only after them."""
  counts = is_token.sum(1)
  is_valid = (counts > 0) & (is_token == (np.arange(is_token.shape[1]) < counts[:, None])).all(1)
  if not is_valid.all():
    row = int(np.argmin(is_valid))
    got = "padding between tokens" if counts[row] else "none"
    raise ValueError(
      f"{name}: expected tokens first and padding last, got {got} in {example_name(ids, row)}"
    )


def _filled(rows: Sequence[Tokens], length: int, fill: int) -> np.ndarray:
  array = np.full((len(rows), length), fill, np.int32)
  for row, values in enumerate(rows):
    array[row, : len(values)] = values
  return array
