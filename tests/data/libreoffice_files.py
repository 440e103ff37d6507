"""Writes small help pages and catalogs with the layout of LibreOffice's packages."""

import struct

from distill_jax.data.sets import libreoffice

PAGE = """<!DOCTYPE html>
<html lang="en-US"><head><title>Title</title><script>var a = "<p id='x'>";</script></head><body>
<header><p dir="auto">LibreOffice 7.4 Help</p></header>{}</body></html>"""


def write_page(root, language, document, elements):
  """Writes a help page; `elements` is HTML."""
  path = root / libreoffice.HELP / language / "text" / f"{document}.html"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(PAGE.format(elements), encoding="utf-8")
  return path


def write_catalog(root, name, entries, order="<"):
  """Writes a catalog of {'context\\4text': 'translation'}, as msgfmt does."""
  keys = [key.encode() for key in entries]
  values = [value.encode() for value in entries.values()]
  count = len(keys)
  start = 28 + 16 * count
  tables, content = [], b""
  for string in keys + values:
    tables += [len(string), start + len(content)]
    content += string + b"\0"
  header = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
  path = root / libreoffice.CATALOGS / f"{name}.mo"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(header + struct.pack(f"{order}{4 * count}I", *tables) + content)
  return path
