"""Sphinx's configuration of the site; CONTRIBUTING says how to build it.

The docstrings are Markdown in Google's layout. `as_restructured_text` translates them for Sphinx.
"""

import ast
import re
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sphinx.domains.python import PyObject  # noqa: E402

from distill_jax.version import __version__  # noqa: E402

project = "distill_jax"
author = "the distill_jax authors"
project_copyright = author
release = __version__
# The one place of the address is pyproject.toml. It has none before the first upload.
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = _PROJECT.get("urls", {}).get("Repository", "")

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "substitution"]
# Pages name notebooks as {{ quickstart }}: opened in Colab where the repository has an address.
_COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
myst_substitutions = {
  path.stem: f"[{path.stem}]({_COLAB}/blob/main/colabs/{path.name})"
  if REPOSITORY
  else f"[{path.stem}](../../colabs/{path.name})"
  for path in (ROOT / "colabs").glob("*.ipynb")
}
myst_heading_anchors = 3

# Docstrings give shapes and units of arguments; the signature gives their types.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
maximum_signature_line_length = 88
napoleon_custom_sections = [
  ("Raises (in apply)", "raises_style"),
  ("Arguments of the step", "params_style"),
]
napoleon_use_ivar = True
napoleon_use_rtype = False

# Types of other packages have no page here; type aliases and type variables have none anywhere.
nitpick_ignore_regex = [("py:.*", r".*")]

# Prose names flags (`--config`) and shapes ([..., C]) as they are typed.
smartquotes = False

html_theme = "sphinx_book_theme"
html_title = "distill_jax"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {
  "navigation_with_keys": False,
  "show_toc_level": 2,
  "navbar_persistent": [],  # A second search box, next to that of the sidebar.
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Files outside of this folder that the site shows as pages.
PAGES = {"README.md": "index.md", "distill_jax/losses/README.md": "reference/loss_table.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")
# A code span with the characters that touch it, and what is markup in reStructuredText only.
_CODE_SPAN = re.compile(r"(\w?)`([^`]+)`(\w?)")
_MARKUP = re.compile(r"[*|@\\]|(?<=\w)_(?!\w)")
# The last lines of a loss's docstring: a list, not a paragraph.
_LOSS_FIELD = re.compile(r"^(Compares|Shapes|Use|Weight|Source):", re.MULTILINE)


def _translate_text(text: str) -> str:
  """Doubles the backticks of code spans, and escapes the text between them."""
  result, end = "", 0
  for span in _CODE_SPAN.finditer(text):
    before, code, after = span.groups()
    result += _MARKUP.sub(r"\\\g<0>", text[end : span.start()])
    result += before + ("\\ " if before else "") + f"``{code}``" + ("\\ " if after else "") + after
    end = span.end()
  return _LOSS_FIELD.sub(r":\1:", result + _MARKUP.sub(r"\\\g<0>", text[end:]))


def _language(code: str) -> str:
  try:
    ast.parse(textwrap.dedent(code))
  except SyntaxError:
    return "text"
  return "python"


def as_restructured_text(docstring: str) -> str:
  """Translates a docstring: indented paragraphs become code blocks, other text is escaped."""
  result: list[str] = []
  text_indent, in_code = 0, False
  for paragraph in docstring.split("\n\n"):
    first_line = paragraph.lstrip("\n")
    indent = len(first_line) - len(first_line.lstrip())
    is_code = indent >= text_indent + 4
    if is_code and not in_code:
      result.append(" " * text_indent + f".. code-block:: {_language(paragraph)}")
    elif not is_code:
      text_indent = indent
    is_literal = is_code or first_line.startswith(">>> ")
    result.append(paragraph if is_literal else _translate_text(paragraph))
    in_code = is_code
  return "\n\n".join(result)


def _translate_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]):
  lines[:] = as_restructured_text("\n".join(lines)).split("\n")


def _skip_namedtuple_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any):
  """Skips the generated docstrings of fields, which the class's docstring describes."""
  is_generated = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
  return True if is_generated else None


def _link_repository_files(app: Any, name: str, source: list[str]) -> None:
  """Points links to files outside of the site at the repository.

  Without its address the site has copies of the files, and no links to folders and Markdown.
  """
  folder = Path(app.env.doc2path(name)).parent

  def replace(link: re.Match) -> str:
    text, target = link.groups()
    path = (folder / target).resolve()
    if path.is_relative_to(app.srcdir) or not path.is_relative_to(ROOT) or not path.exists():
      return link[0]
    file = path.relative_to(ROOT).as_posix()
    if file in PAGES:
      return f"[{text}](/{PAGES[file]})"
    if REPOSITORY:
      return f"[{text}]({REPOSITORY}/blob/main/{file})"
    return text if path.is_dir() or path.suffix == ".md" else link[0]

  source[0] = _LINK.sub(replace, source[0])


def _rename_variables() -> None:
  """Heads the fields of a class as its docstring does; Sphinx calls them variables."""
  (field,) = [field for field in PyObject.doc_field_types if field.name == "variable"]
  field.label = "Attributes"


def setup(app: Any) -> None:
  _rename_variables()
  app.connect("source-read", _link_repository_files)
  app.connect("autodoc-process-docstring", _translate_docstring, priority=400)
  app.connect("autodoc-skip-member", _skip_namedtuple_fields)
