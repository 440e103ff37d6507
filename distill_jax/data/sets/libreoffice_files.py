"""Reads the files of LibreOffice's packages: help pages and compiled catalogs of gettext."""

import struct
from html.parser import HTMLParser
from pathlib import Path

from distill_jax.storage import files

_BLOCKS = frozenset(("p", "td", "li", "h1", "h2", "h3", "h4", "h5", "h6"))
_MAGIC = 0x950412DE


def read_page(path: Path) -> dict[str, str]:
  """Returns the texts of a help page by the id of the innermost p, h1 to h6, td or li.

  Raises:
    ValueError: the file is not UTF-8.
  """
  parser = _Page()
  try:
    parser.feed(files.read(path).decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ValueError(f"folder: expected UTF-8 in {path}, got another byte: {error}") from error
  parser.close()
  return parser.texts


def read_catalog(path: Path) -> list[tuple[str, str, str]]:
  """Returns the entries of a compiled catalog of gettext: context, text and translation.

  Of texts with a plural, both forms are entries.

  Raises:
    ValueError: the file is no such catalog, or cut off.
  """
  content = files.read(path)
  try:
    order = "<" if struct.unpack_from("<I", content)[0] == _MAGIC else ">"
    magic, _, count, source, target = struct.unpack_from(f"{order}5I", content)
    if magic != _MAGIC:
      raise ValueError("no catalog of gettext")
    keys, values = (_strings(content, order, start, count) for start in (source, target))
  except (struct.error, ValueError) as error:
    raise ValueError(f"folder: expected a catalog in {path}, got another file: {error}") from error
  entries = []
  for key, value in zip(keys, values):
    context, _, text = key.rpartition("\4")
    if text:
      entries += [(context, *forms) for forms in zip(text.split("\0"), value.split("\0"))]
  return entries


def one_line(text: str) -> str:
  """Returns a text with one space for any white space, and none at its ends."""
  return " ".join(text.split())


def _strings(content: bytes, order: str, start: int, count: int) -> list[str]:
  table = struct.unpack_from(f"{order}{2 * count}I", content, start)
  strings = []
  for size, offset in zip(table[::2], table[1::2]):
    if offset + size > len(content):
      raise ValueError(f"it ends at byte {len(content)}")
    strings.append(content[offset : offset + size].decode("utf-8"))
  return strings


class _Page(HTMLParser):
  """Collects the texts of the elements that have an id."""

  def __init__(self):
    super().__init__()
    self.texts: dict[str, str] = {}
    self._open: list[tuple[str, str | None, list[str]]] = []

  def handle_starttag(self, tag, attrs):
    if tag in _BLOCKS:
      self._open.append((tag, dict(attrs).get("id"), []))
    elif tag == "br":
      self.handle_data(" ")

  def handle_endtag(self, tag):
    if self._open and self._open[-1][0] == tag:
      _, name, parts = self._open.pop()
      text = one_line("".join(parts))
      if name and text:
        self.texts.setdefault(name, text)

  def handle_data(self, data):
    if self._open:
      self._open[-1][2].append(data)
