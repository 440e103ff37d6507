"""Runs every Python block of the guides, in order, with few steps."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "distill_jax" / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TOP_LEVEL = ("start", "choosing", "troubleshooting")
PAGES = [DOCS / f"{name}.md" for name in TOP_LEVEL] + sorted((DOCS / "guides").glob("*.md"))
MAX_STEPS = 4


def shorten(code):
  """Returns a block with at most `MAX_STEPS` steps of training."""

  def number(match):
    return f"{match[1]}={min(int(match[2].replace('_', '')), MAX_STEPS)}"

  return re.sub(r"\b(steps|every)=([\d_]+)", number, code)


@pytest.mark.integration
# After so few steps a score may not have changed.
@pytest.mark.filterwarnings("ignore:best:UserWarning", "ignore:patience:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = {"__name__": "__main__"}
  for number, block in enumerate(BLOCK.findall(page.read_text())):
    exec(compile(shorten(block), f"{page.name}, block {number}", "exec"), names)


def test_blocks_are_shortened():
  assert shorten("fit(steps=1_500, every=2)") == "fit(steps=4, every=2)"
