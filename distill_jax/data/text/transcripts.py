"""Makes rows of recordings or pictures of lines with their transcripts, for CTC networks."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.text.sequences import SequenceTokenizer
from distill_jax.errors import check_integer, join_first, suggest

BLANK = 0
"""The class of the blank, and the first label of an empty transcript."""


def character_tokenizer(characters: Iterable[str]) -> SequenceTokenizer:
  """Returns the tokenizer of texts whose characters are the classes 1, 2, ...; 0 is CTC's blank.

  Args:
    characters: the alphabet, each once.

  Returns:
    A tokenizer whose `encode` raises a ValueError for other characters. `decode` stops at the
    first 0 or negative number.

  Raises:
    ValueError: there are no characters, one repeats, or has not the length 1.

  >>> from distill_jax.data import text
  >>> letters = text.character_tokenizer(" abct")
  >>> letters.encode("a cat"), letters.decode([4, 2, 5, 0, 0]), letters.size
  (array([2, 1, 4, 2, 5], dtype=int32), 'cat', 6)
  """
  alphabet = list(characters)
  if not alphabet or any(not isinstance(x, str) or len(x) != 1 for x in alphabet):
    raise ValueError(f"characters: expected single characters such as ' abc', got {alphabet}")
  classes = {character: i for i, character in enumerate(alphabet, start=1)}
  if len(classes) != len(alphabet):
    repeated = next(x for i, x in enumerate(alphabet, start=1) if classes[x] != i)
    raise ValueError(f"characters: expected each once, got {repeated!r} twice")

  def unknown(text: str) -> list[str]:
    return [x for x in text if x not in classes]

  def hint(text: str) -> str:
    composed = unicodedata.normalize("NFC", text)
    if len(unknown(composed)) < len(unknown(text)):
      return ', whose letters are decomposed: write unicodedata.normalize("NFC", text)'
    return suggest(unknown(text)[0], alphabet)

  def encode(text: str) -> np.ndarray:
    for character in text:
      if character not in classes:
        raise ValueError(
          f"text: expected characters of the alphabet, got {character!r} in {text!r}{hint(text)}"
        )
    return np.array([classes[x] for x in text], np.int32)

  def decode(tokens: Iterable[int]) -> str:
    decoded = []
    for token in map(int, tokens):
      if token > len(alphabet):
        raise ValueError(f"tokens: expected at most {len(alphabet)}, got {token}")
      if token <= BLANK:
        break
      decoded.append(alphabet[token - 1])
    return "".join(decoded)

  digest = hashlib.blake2b("".join(alphabet).encode(), digest_size=8).hexdigest()
  size = len(alphabet) + 1
  return SequenceTokenizer(encode, decode, size, BLANK, BLANK, BLANK, f"characters:{digest}")


def speech_source(
  features: Sequence[np.ndarray],
  transcripts: Sequence[Any] | None,
  tokenizer: SequenceTokenizer,
  *,
  frames: int,
  label_length: int,
  frames_per_step: int = 1,
  drop_longer: bool = False,
  name: str = "speech",
) -> Source:
  """Makes a source of recordings with their transcripts for `objectives.ctc`.

  Args:
    features: floats [frames, F] of each recording, such as of `audio.log_mel`.
    transcripts: what is said in each, as the tokenizer's `encode` takes it; "" where nothing is
      said. None: there are none, as of recordings for a teacher to label.
    tokenizer: such as `character_tokenizer`; class 0 must be the blank.
    frames: frames in a row, T.
    label_length: classes in a row of labels, U.
    frames_per_step: how many frames the network reads for each frame of its logits. Transcripts
      that do not fit, with a blank between equal neighbors, are counted and printed: the loss
      leaves them out.
    drop_longer: whether rows with more frames or classes, or with a transcript that does not fit,
      are left out, and their number printed; the first two raise otherwise.
    name: name of the source.

  Returns:
    A `Source` of 'features' float32 [N, T, F], 0 behind a row's last frame; 'frames' int32 [N], how
    many are valid; 'label' int32 [N, U], `UNLABELED` behind a transcript. An empty transcript is
    one blank. An id is the index in `features`.

  Raises:
    ValueError: no rows, other numbers of rows, a transcript that the tokenizer does not encode,
      such as None, another shape, no frames, or a row that is too long, which the error names.

  >>> from distill_jax.data import text
  >>> letters = text.character_tokenizer("act")
  >>> recordings = [np.ones((4, 2)), np.ones((6, 2))]
  >>> source = text.speech_source(recordings, ["cat", ""], letters, frames=6, label_length=4)
  >>> source.arrays["frames"], source.arrays["label"].tolist()
  (array([4, 6], dtype=int32), [[2, 1, 3, -1], [0, -1, -1, -1]])
  """
  check_integer("frames_per_step", frames_per_step, 1)
  features = [np.asarray(x, np.float32) for x in features]
  sizes = _sizes("features", features, 0, "[frames, bands]")
  labels = _labels(transcripts, tokenizer, len(features))
  rows = _rows("frames", sizes, frames, labels, label_length, frames_per_step, drop_longer, name)
  array = np.zeros((len(rows), frames, features[0].shape[1]), np.float32)
  for row, i in enumerate(rows):
    array[row, : sizes[i]] = features[i]
  inputs = {"features": array, "frames": sizes[rows]}
  return _source(inputs, rows, labels, label_length, tokenizer, name)


def line_source(
  images: Sequence[np.ndarray],
  transcripts: Sequence[Any] | None,
  tokenizer: SequenceTokenizer,
  *,
  width: int,
  label_length: int,
  columns_per_step: int = 1,
  drop_longer: bool = False,
  name: str = "lines",
) -> Source:
  """Makes a source of pictures of text lines with their transcripts for `objectives.ctc`.

  Args:
    images: uint8, or floats in 0..1, [H, W] or [H, W, C], of one height.
    width: columns in a row, W.
    columns_per_step: how many columns the network reads for each frame of its logits.
    transcripts, tokenizer, label_length, drop_longer, name: as of `speech_source`.

  Returns:
    A `Source` of 'image' float32 [N, H, W, C] in 0..1, 0 to the right of a picture; 'widths' int32
    [N], how many columns are valid; and 'label' as of `speech_source`.

  Raises:
    ValueError: as `speech_source`, or the heights differ.

  >>> from distill_jax.data import text
  >>> letters = text.character_tokenizer("act")
  >>> images = [np.ones((4, 9)), np.ones((4, 5))]
  >>> source = text.line_source(images, ["act", "a"], letters, width=10, label_length=3)
  >>> source.arrays["image"].shape, source.arrays["widths"], source.arrays["label"].tolist()
  ((2, 4, 10, 1), array([9, 5], dtype=int32), [[1, 2, 3], [1, -1, -1]])
  """
  check_integer("columns_per_step", columns_per_step, 1)
  images = [_picture(image) for image in images]
  sizes = _sizes("images", images, 1, "[height, width, channels]")
  labels = _labels(transcripts, tokenizer, len(images))
  rows = _rows("width", sizes, width, labels, label_length, columns_per_step, drop_longer, name)
  height, _, channels = images[0].shape
  array = np.zeros((len(rows), height, width, channels), np.float32)
  for row, i in enumerate(rows):
    array[row, :, : sizes[i]] = images[i]
  inputs = {"image": array, "widths": sizes[rows]}
  return _source(inputs, rows, labels, label_length, tokenizer, name)


def _source(inputs, rows, labels, label_length: int, tokenizer, name: str) -> Source:
  if labels is None:
    return Source({"id": rows, **inputs}, name=name)
  label = np.full((len(rows), label_length), UNLABELED, np.int32)
  for row, i in enumerate(rows):
    label[row, : len(labels[i])] = labels[i]
    if not len(labels[i]):
      label[row, 0] = BLANK
  return Source(
    {"id": rows, **inputs, "label": label},
    tokenizer.size,
    name=name,
    ignore_label=UNLABELED,
    vocabulary=tokenizer.identity,
  )


def _picture(image: np.ndarray) -> np.ndarray:
  image = np.asarray(image)
  pixels = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
  if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
    raise ValueError(
      f"images: expected uint8, or floats in 0..1, got {image.dtype} in "
      f"{image.min()}..{image.max()}: divide them"
    )
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _sizes(field: str, arrays: Sequence[np.ndarray], axis: int, layout: str) -> np.ndarray:
  """Returns the sizes along an axis, int32 [N]; the other axes must be alike."""
  if not len(arrays):
    raise ValueError(f"{field}: expected at least one, got none")
  others = [x.shape[:axis] + x.shape[axis + 1 :] for x in arrays]
  ndim = layout.count(",") + 1
  for row, array in enumerate(arrays):
    if array.ndim != ndim or not array.size:
      hint = ": leave it out" if array.ndim == ndim else ""
      raise ValueError(
        f"{field}: expected {layout}, at least 1 each, got {list(array.shape)} in row {row}{hint}"
      )
    if others[row] != others[0]:
      raise ValueError(
        f"{field}: expected {layout} of one size but for the {layout.strip('[]').split(', ')[axis]}"
        f", got {list(array.shape)} in row {row} after {list(arrays[0].shape)}"
      )
  return np.array([x.shape[axis] for x in arrays], np.int32)


def _labels(transcripts, tokenizer: SequenceTokenizer, count: int) -> list[np.ndarray] | None:
  if transcripts is None:
    return None
  if len(transcripts) != count:
    raise ValueError(f"transcripts: expected one for each of {count} rows, got {len(transcripts)}")
  labels = []
  for row, transcript in enumerate(transcripts):
    try:
      labels.append(tokenizer.encode(transcript))
    except ValueError as error:
      raise ValueError(f"transcripts: row {row}: {error}") from error
    except (TypeError, AttributeError) as error:
      raise ValueError(
        f"transcripts: expected what the tokenizer encodes, got {transcript!r} in row {row}: write "
        "'' where nothing is said, and leave out rows without a transcript"
      ) from error
    if BLANK in labels[row]:
      raise ValueError(f"transcripts: expected no class {BLANK}, the blank, got it in row {row}")
  return labels


def _rows(
  field: str, sizes, size: int, labels, label_length: int, per_step: int, drop: bool, name: str
) -> np.ndarray:
  """Returns the rows that are left, and prints how many are left out or do not fit."""
  check_integer(field, size, 1)
  check_integer("label_length", label_length, 1)
  labels = [()] * len(sizes) if labels is None else labels
  lengths = np.array([len(x) for x in labels])
  repeats = np.array([np.sum(np.equal(x[1:], x[:-1])) for x in labels], int)
  is_large, is_long = sizes > size, lengths > label_length
  is_unfit = ~is_large & ~is_long & (lengths + repeats > -(-sizes // per_step))
  counts = (
    f"{is_large.sum():,} with more than {size} {field}, {is_long.sum():,} with more than "
    f"{label_length} classes, {is_unfit.sum():,} with transcripts that do not fit their steps"
  )
  is_left = ~(is_large | is_long | is_unfit)
  if drop:
    print(f"{name}: left out {(~is_left).sum():,} of {len(sizes):,}: {counts}", flush=True)
    if not is_left.any():
      raise ValueError(f"{field}: expected some rows that fit, got none of {len(sizes)}: {counts}")
    return np.flatnonzero(is_left)
  if (is_large | is_long).any():
    rows = join_first(np.flatnonzero(is_large | is_long).tolist())
    raise ValueError(
      f"{field if is_large.any() else 'label_length'}: expected room for all rows, got {counts}, "
      f"rows {rows}: raise it, or write drop_longer=True"
    )
  if is_unfit.any():
    rows = join_first(np.flatnonzero(is_unfit).tolist())
    print(
      f"{name}: {is_unfit.sum():,} of {len(sizes):,} transcripts do not fit their steps and do not "
      f"count in the loss: rows {rows}",
      flush=True,
    )
  return np.arange(len(sizes))
