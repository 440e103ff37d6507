"""Words for the released network of g2p-en, and what it says of them."""

import functools
import importlib.metadata
import pathlib

import jax
import numpy as np

from distill_jax.data import text
from distill_jax.data.sets.pronunciations import GRAPHEMES, PHONES
from distill_jax.models.decoding import sampler
from distill_jax.models.seq2seq.g2p import g2p_steps

SAMPLE = pathlib.Path(__file__).with_name("cmudict_200.txt")
LETTERS = text.symbol_tokenizer(GRAPHEMES)
SYMBOLS = text.symbol_tokenizer(PHONES)


def released() -> pathlib.Path | None:
  """The weights that the package carries. It is not imported: that downloads data."""
  try:
    files = importlib.metadata.files("g2p-en") or []
  except importlib.metadata.PackageNotFoundError:
    return None
  return next((pathlib.Path(str(f.locate())) for f in files if f.name == "checkpoint20.npz"), None)


def spell(words) -> dict[str, np.ndarray]:
  """Returns the entries 'source' and 'source_segments' of words, each with its end token."""
  lengths = np.array([len(word) + 1 for word in words])
  inside = np.arange(lengths.max()) < lengths[:, None]
  source = np.full(inside.shape, LETTERS.pad, np.int32)
  for row, word in zip(source, words):
    row[: len(word) + 1] = [*LETTERS.encode(word), LETTERS.end]
  return {"source": source, "source_segments": np.where(inside, 0, -1).astype(np.int32)}


@functools.cache
def greedy():
  """Returns the compiled sampler of at most 20 phones, as g2p-en."""
  return jax.jit(sampler(g2p_steps(), max_length=20))


def pronounce(variables, words) -> list[list[str]]:
  tokens, lengths = map(np.asarray, greedy()(variables, None, spell(words)))
  return [list(SYMBOLS.decode(row[:length])) for row, length in zip(tokens, lengths)]


def phone_error_rate(found, expected) -> float:
  return sum(map(edits, found, expected)) / sum(map(len, expected))


def edits(a, b) -> int:
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    last, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
  return row[-1]


def dictionary(path=SAMPLE) -> tuple[list[str], list[list[str]]]:
  lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
  return [line[0] for line in lines], [line[1:] for line in lines]
