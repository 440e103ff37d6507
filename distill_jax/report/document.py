"""Builds a document of headings, text, tables and pictures, as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Heading(NamedTuple):
  """A heading of a section."""

  text: str


class Text(NamedTuple):
  """A paragraph of plain text."""

  text: str


class Code(NamedTuple):
  """Text in a fixed-width font; line breaks are kept."""

  text: str


class Table(NamedTuple):
  """A table whose first column is aligned left, the others right if `numeric`."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  numeric: bool = True


class Picture(NamedTuple):
  """A picture with a caption.

  Attributes:
    file: its name in the document's folder.
    title: text in place of the picture.
    caption: text below it.
    png: its bytes.
    inches: its width on a page 10 inches wide.
    phone: bytes of the picture that a page in HTML shows on a narrow screen.
  """

  file: str
  title: str
  caption: str
  png: bytes
  inches: float
  phone: bytes


class Sound(NamedTuple):
  """A sound with a player.

  Attributes:
    file: its name in the document's folder.
    title: text in place of the player.
    wav: its bytes.
  """

  file: str
  title: str
  wav: bytes


class Numbers(NamedTuple):
  """Plain values under `name` in results.json; a page does not show them."""

  name: str
  values: Any


Block = Heading | Text | Code | Table | Picture | Sound | Numbers


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
  """Returns a page of GitHub Markdown; pictures are links to files in its folder."""
  return f"# {_md(title)}\n\n{fragment(blocks)}\n"


def fragment(blocks: Sequence[Block]) -> str:
  """Returns Markdown without a title, for insertion into another page."""
  return "\n\n".join(filter(None, map(_markdown_block, blocks)))


def to_html(title: str, blocks: Sequence[Block]) -> str:
  """Returns one HTML file that loads nothing: it includes its style and pictures."""
  body = "\n".join(filter(None, map(_html_block, blocks)))
  name = html.escape(title)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{name}</h1>
{body}
</main>
</body>
</html>
"""


def _markdown_block(block: Block) -> str:
  match block:
    case Heading(text):
      return f"## {_md(text)}"
    case Text(text):
      return _md(text)
    case Code(text):
      fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
      return f"{fence}\n{text}\n{fence}"
    case Table(header, rows, numeric):
      rule = ["---"] + ["---:" if numeric else "---"] * (len(header) - 1)
      lines = [map(_md, header), rule, *(map(_md, row) for row in rows)]
      return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    case Picture(file, title, caption):
      return f"![{_md(title)}]({file})\n\n{_md(caption)}"
    case Sound(file, title):
      return f"[{_md(title)}]({file})"
    case Numbers():
      return ""


def _html_block(block: Block) -> str:
  match block:
    case Heading(text):
      return f"<h2>{html.escape(text)}</h2>"
    case Text(text):
      return f"<p>{html.escape(text)}</p>"
    case Code(text):
      return f"<pre><code>{html.escape(text)}</code></pre>"
    case Table(header, rows, numeric):
      head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
      head = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
      body = "\n".join(_html_row(row) for row in rows)
      css_class = "numeric" if numeric else "plain"
      table = f'<table class="{css_class}">\n{head}<tbody>\n{body}\n</tbody>\n</table>'
      return f'<div class="scroll" tabindex="0">{table}</div>'
    case Picture(_, title, caption, png, inches, phone):
      width = f"--width: {10 * inches:.0f}%"
      image = f'<img alt="{html.escape(title)}" style="{width}" src="{_address(png)}">'
      source = f'<source media="(max-width: {_NARROW}px)" srcset="{_address(phone)}">'
      text = html.escape(caption)
      return f"<figure><picture>{source}{image}</picture><figcaption>{text}</figcaption></figure>"
    case Sound(_, title, wav):
      address = f"data:audio/wav;base64,{base64.b64encode(wav).decode()}"
      return f'<audio controls aria-label="{html.escape(title)}" src="{address}"></audio>'
    case Numbers():
      return ""


def _html_row(row: Sequence[str]) -> str:
  first, *rest = map(html.escape, row)
  return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def _address(png: bytes) -> str:
  return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _md(text: str) -> str:
  """Returns the text on one line, escaped so that Markdown shows it unchanged."""
  text = html.escape(" ".join(text.split()), quote=False)
  return re.sub(r"([\\`*_{}\[\]|~#$])", r"\\\1", text)


_NARROW = 600  # CSS pixels up to which a screen is narrow
# Four backgrounds make shadows at the ends of a table that scrolls: two move with it and cover them
# where it ends.
_STYLE = (
  """
:root { color-scheme: light dark; }
:root { --ink: #1c1f23; --soft: #5b636d; --line: #d8dde3; --page: #fff; --tint: #f4f6f8; }
:root { --shade: #0004; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #a3abb5; --line: #3a414a; --page: #16191d; --tint: #20252b; }
  :root { --shade: #fff5; }
}
body { margin: 0; background: var(--page); color: var(--ink); }
body { font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; }
h2 { border-bottom: 1px solid var(--line); }
p { max-width: 48rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll {
  background:
    linear-gradient(to right, var(--page) 50%, transparent) local left / 3rem 100% no-repeat,
    linear-gradient(to left, var(--page) 50%, transparent) local right / 3rem 100% no-repeat,
    linear-gradient(to right, var(--shade), transparent) scroll left / 1rem 100% no-repeat,
    linear-gradient(to left, var(--shade), transparent) scroll right / 1rem 100% no-repeat;
}
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; }
thead th { background: var(--tint); border-bottom: 2px solid var(--line); }
tbody th { font-weight: 400; }
.numeric { width: 100%; }
.numeric tbody th, .numeric td { white-space: nowrap; }
.numeric td, .numeric thead th + th { text-align: right; }
.plain td { overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .75rem 1rem; border-radius: 6px; font-size: .88rem; }
pre { overflow-x: auto; }
figure { margin: 1rem 0; }
figure img { width: var(--width); background: #fff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 48rem; }
"""
  f"@media (max-width: {_NARROW}px) {{"
  """
  figure img { width: 100%; }
  th, td { padding: .3rem .4rem; }
  .numeric th:first-child { position: sticky; left: 0; background: var(--page); }
  .numeric tbody th { white-space: normal; min-width: 7rem; }
}
"""
)
