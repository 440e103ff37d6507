"""The README's table of tested versions, the files of `.ci/ends`, and pyproject agree."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "versions.py"))


def pins(name):
  text = (ROOT / ".ci" / name).read_text()
  return dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))


def floors():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  groups = [project["dependencies"], *project["optional-dependencies"].values()]
  return dict(line.split(">=") for group in groups for line in group if ">=" in line)


@pytest.mark.parametrize("name", ["oldest.txt", "newest.txt"])
def test_readme_lists_the_versions_of_ci(name):
  (header, *rows) = (
    re.findall(r"[\w.-]+", line) for line in SCRIPT["TABLE"].search(README)[0].splitlines()[2:]
  )
  tested = [dict(zip(header, row)) for row in rows[1:]]
  expected = {k: v for k, v in pins(name).items() if k in header}
  assert "jax" in expected
  assert [row for row in tested if expected.items() <= row.items()]


def test_floors_are_the_oldest_tested_versions():
  oldest, lowest = pins("oldest.txt"), floors()
  names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "qwix")
  assert {name: lowest[name] for name in names} == {name: oldest[name] for name in names}


def test_a_row_replaces_the_one_of_its_python():
  text = "<!-- versions -->\n\n| Python | jax |\n| --- | --- |\n"
  for row in ("| 3.13 | 2 |\n", "| 3.11 | 1 |\n", "| 3.13 | 3 |\n"):
    text = SCRIPT["with_row"](text, row)
  assert text.endswith("| --- | --- |\n| 3.11 | 1 |\n| 3.13 | 3 |\n")
