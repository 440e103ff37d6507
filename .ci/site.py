"""Checks the built site: every link leads somewhere, and the reference has every public name.

`.ci/docs` calls it after the build: `python .ci/site.py build/site`. Addresses of other sites are
checked by their form only, because the tests need no network.
"""

import html.parser
import importlib
import sys
import urllib.parse
from pathlib import Path

from sphinx.util.inventory import InventoryFile

import distill_jax

# Public names are those of `__all__`, the lazy ones of `__dir__`, and all of modules without both.
PACKAGES = sorted(set(dir(distill_jax)) & set(distill_jax._SUBPACKAGES)) + ["cost", "data.text"]


class Page(html.parser.HTMLParser):
  """The addresses that a page links to, and the anchors that it has."""

  def __init__(self, path: Path):
    super().__init__()
    self.links: set[str] = set()
    self.anchors: set[str] = set()
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    self.links |= {attributes[name] for name in ("href", "src") if attributes.get(name)}
    self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}


def broken_links(site: Path) -> list[str]:
  """Returns 'page: link' for each link without a file, without an anchor, or of a wrong form."""
  # The theme's folder has templates that end in .html.
  paths = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
  pages = {path: Page(path) for path in paths}
  broken = []
  for path, page in pages.items():
    for link in sorted(page.links):
      url = urllib.parse.urlsplit(link)
      if url.scheme or url.netloc:
        is_sound = url.scheme in ("https", "data", "mailto") and " " not in link
      else:
        target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
        is_sound = target.exists()
        if target in pages and url.fragment:
          is_sound = urllib.parse.unquote(url.fragment) in pages[target].anchors
      if not is_sound:
        broken.append(f"{path.relative_to(site)}: {link}")
  return broken


def public_names() -> list[str]:
  """Returns the full names of all that the packages export."""
  names = [f"distill_jax.{name}" for name in distill_jax.__all__ if name != "__version__"]
  for package in PACKAGES:
    module = importlib.import_module(f"distill_jax.{package}")
    exported = set(getattr(module, "__all__", ())) | set(getattr(module, "_LAZY", ()))
    names += [f"{module.__name__}.{name}" for name in sorted(exported)]
  return names


def run(site: Path) -> None:
  inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
  described = {name for kind, names in inventory.items() if kind[:3] == "py:" for name in names}
  missing = [f"reference: {name} is missing" for name in public_names() if name not in described]
  problems = broken_links(site) + missing
  print("\n".join(problems) or f"{site}: links and {len(public_names())} public names are sound")
  sys.exit(bool(problems))


if __name__ == "__main__":
  run(Path(sys.argv[1]))
