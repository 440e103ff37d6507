"""Reads English sentences of LibreOffice with their French translations from Debian's packages.

The texts are those of the help pages and of the menus, dialogs and messages (LibreOffice's
contributors, MPL-2.0). The packages are installed, or unpacked without what they depend on:

    apt-get install libreoffice-help-en-us libreoffice-help-fr libreoffice-l10n-fr

    apt-get download libreoffice-help-en-us libreoffice-help-fr libreoffice-l10n-fr
    for package in libreoffice-*.deb; do dpkg-deb -x $package runs/debian; done

Version 7.4 of Debian 12 has 81,150 pairs in 2,581 documents: 2,548 help pages and 33 catalogs. They
are of 51,470 distinct English sentences, of which 12,816 stand in several documents. Reading them
takes half a minute; `load` keeps them in a file.
"""

import collections
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from distill_jax.data.sets.libreoffice_files import one_line, read_catalog, read_page
from distill_jax.errors import check_integer
from distill_jax.storage import files, folders

HELP = "usr/share/libreoffice/help"
CATALOGS = "usr/lib/libreoffice/program/resource/fr/LC_MESSAGES"
SPLITS = ("train", "validation", "test")
_PACKAGES = "libreoffice-help-en-us libreoffice-help-fr libreoffice-l10n-fr"
# The end of a sentence is followed by a capital, maybe in quotation marks.
_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=[«"“(]*\s?[A-ZÀ-ÖØ-Þ])')


class Pair(NamedTuple):
  """A sentence and its translation.

  Attributes:
    document: the help page, such as 'help/scalc/01/02110000', or the catalog, such as 'ui/sc'.
    english: one line of plain text without spaces at its ends.
    french: as `english`.
  """

  document: str
  english: str
  french: str


def load(path: str | os.PathLike, folder: str | os.PathLike = "/") -> list[Pair]:
  """Returns the pairs of a file, which is written from the packages where it is missing.

  Args:
    path: a file of lines of document, English and French, separated by tabs.
    folder: as of `sentences`; not read where the file exists.

  Raises:
    FileNotFoundError: as `sentences`.
    ValueError: a line of the file has other than three columns.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "libreoffice.tsv")
  >>> path.write_text("ui/sc\\tSave\\tEnregistrer\\n")
  23
  >>> load(path)
  [Pair(document='ui/sc', english='Save', french='Enregistrer')]
  """
  path = folders.resolve(path, "path")
  if not path.exists():
    lines = ("\t".join(pair) + "\n" for pair in sentences(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(lines))
  rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
  for number, row in enumerate(rows, start=1):
    if len(row) != 3:
      raise ValueError(
        f"path: expected document, English and French in line {number} of {path}, got {len(row)} "
        "columns: delete this file"
      )
  return [Pair(*row) for row in rows]


def sentences(folder: str | os.PathLike = "/") -> list[Pair]:
  """Returns the pairs of all help pages and catalogs, in the order of the documents.

  A document has each English sentence once, with its first translation. Paragraphs are split into
  sentences where both sides have as many. Left out are texts that are equal on both sides, such as
  code, and those without a letter. White space, also before French punctuation, is one plain space.

  Args:
    folder: the root of the packages' files: "/" where they are installed.

  Raises:
    FileNotFoundError: the folder has not the files of all three packages.
    ValueError: a file is corrupt.
  """
  root = folders.resolve(folder, "folder")
  pages = _pages(root / HELP)
  catalogs = sorted((root / CATALOGS).glob("*.mo"))
  if not pages or not catalogs:
    missing = HELP if not pages else CATALOGS
    raise FileNotFoundError(
      f"folder: expected the files of {_PACKAGES}, got none of {root / missing}: apt-get install "
      "them, or name a folder into which they are unpacked by dpkg-deb -x"
    )
  pairs = []
  for document, english, french in pages:
    pairs += _document(document, _aligned(read_page(english), read_page(french)))
  for catalog in catalogs:
    pairs += _document(f"ui/{catalog.stem}", map(_plain_pair, read_catalog(catalog)))
  return pairs


def split(
  pairs: Iterable[Pair], *, max_words: int | None = None, held_out: int = 10
) -> dict[str, list[Pair]]:
  """Splits pairs by document; every English sentence is in one split only, and once.

  One document in `held_out` is for validation and one for the test, by a hash of its name. A
  sentence that also stands in a document of training is left out of the other two. Two sentences
  are the same where their letters and digits are, whatever their case and punctuation.

  Args:
    pairs: as of `load`.
    max_words: pairs of which a side has more words are left out; None: there is no limit.
    held_out: number of documents of which one is for validation, and another one for the test.

  Returns:
    The pairs of 'train', 'validation' and 'test'.

  Raises:
    ValueError: a number is out of its range, or a split has no pairs.

  >>> pairs = [Pair(f"page {i}", f"Sentence {i % 25}", f"Phrase {i % 25}") for i in range(30)]
  >>> splits = split(pairs, held_out=4)
  >>> {name: len(pairs) for name, pairs in splits.items()}
  {'train': 13, 'validation': 6, 'test': 6}
  """
  check_integer("held_out", held_out, 3)
  if max_words is not None:
    check_integer("max_words", max_words, 1)
  documents = collections.defaultdict(list)
  for pair in pairs:
    documents[split_of(pair.document, held_out)].append(pair)
  seen: set[str] = set()
  splits = {}
  for name in SPLITS:
    splits[name] = [pair for pair in _unseen(documents[name], seen) if _is_short(pair, max_words)]
    if not splits[name]:
      raise ValueError(f"pairs: expected some in each split, got none in {name}")
  return splits


def split_of(document: str, held_out: int = 10) -> str:
  """Returns the split of a document by a hash of its name: 'train', 'validation' or 'test'."""
  digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
  number = int.from_bytes(digest, "little") % held_out
  return {0: "validation", 1: "test"}.get(number, "train")


def sentence_key(text: str) -> str:
  """Returns the letters and digits of a text, case-folded, by which sentences are compared.

  >>> sentence_key("Add Tables...") == sentence_key("add tables")
  True
  """
  return "".join(x for x in text.casefold() if x.isalnum())


def _pages(root: Path) -> list[tuple[str, Path, Path]]:
  """Returns the name, English and French file of each help page that is there in both."""
  english = root / "en-US" / "text"
  paths = [path.relative_to(english) for path in sorted(english.rglob("*.html"))]
  pages = [
    (f"help/{path.with_suffix('').as_posix()}", english / path, root / "fr" / "text" / path)
    for path in paths
  ]
  return [page for page in pages if page[2].is_file()]


def _aligned(english: dict[str, str], french: dict[str, str]) -> Iterator[tuple[str, str]]:
  return ((text, french[name]) for name, text in english.items() if name in french)


def _plain_pair(entry: tuple[str, str, str]) -> tuple[str, str]:
  """Returns both texts of a catalog's entry as a user sees them, without marks of keys."""
  context, *texts = entry
  # Dialogs of GTK, whose contexts are 'dialog|widget', mark keys by an underscore.
  marks = r"[~_](?=\w)" if "|" in context or context == "stock" else r"~(?=\w)"
  plain = [re.sub(marks, "", text).replace("%PRODUCTNAME", "LibreOffice") for text in texts]
  return one_line(plain[0]), one_line(plain[1])


def _document(name: str, paragraphs: Iterable[tuple[str, str]]) -> list[Pair]:
  """Returns the pairs of a document, each English sentence once."""
  pairs: dict[str, Pair] = {}
  for paragraph in paragraphs:
    for english, french in _split_sentences(*paragraph):
      if english != french and _has_letter(english) and _has_letter(french):
        pairs.setdefault(english, Pair(name, english, french))
  return list(pairs.values())


def _split_sentences(english: str, french: str) -> list[tuple[str, str]]:
  sides = [_SENTENCE_END.split(text) for text in (english, french)]
  if len(sides[0]) != len(sides[1]):
    return [(english, french)]
  return list(zip(*sides))


def _unseen(pairs: Iterable[Pair], seen: set[str]) -> list[Pair]:
  """Returns the pairs whose English sentence is not in `seen`, and adds it."""
  unseen = []
  for pair in pairs:
    key = sentence_key(pair.english)
    if key not in seen:
      seen.add(key)
      unseen.append(pair)
  return unseen


def _is_short(pair: Pair, max_words: int | None) -> bool:
  if max_words is None:
    return True
  return all(len(text.split()) <= max_words for text in (pair.english, pair.french))


def _has_letter(text: str) -> bool:
  return any(map(str.isalpha, text))
