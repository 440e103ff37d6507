"""Writes the versions of this environment into the README's table of tested versions.

.ci/run and .ci/ends call it after their tests passed: `python .ci/versions.py README.md`.
"""

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "keras", "qwix", "numpy")
TABLE = re.compile(r"(<!-- versions -->\n\n(?:\|.*\n){2})((?:\|.*\n)*)")


def row() -> str:
  """Returns the table's row of this environment; Python without its patch release."""
  python = ".".join(platform.python_version_tuple()[:2])
  cells = (python, *map(importlib.metadata.version, PACKAGES))
  return f"| {' | '.join(cells)} |\n"


def with_row(text: str, new: str) -> str:
  """Returns the README's text with a row added, or replaced where its Python is the same."""
  head, body = TABLE.search(text).groups()
  rows = {line.split()[1]: line for line in [*body.splitlines(keepends=True), new]}
  return text.replace(head + body, head + "".join(rows[python] for python in sorted(rows)))


def run(path: Path) -> None:
  path.write_text(with_row(path.read_text(), row()))
  print("tested:", row(), end="")


if __name__ == "__main__":
  run(Path(sys.argv[1]))
