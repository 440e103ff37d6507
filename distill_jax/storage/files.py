"""Writes files atomically: a killed run leaves the old one or the new one."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
  """Writes a file under a temporary name next to it, and renames it.

  Args:
    path: replaced if it exists; its folder must exist.
    content: text is encoded as UTF-8.

  Raises:
    OSError: it cannot be written; an older file stays as it was.
  """
  temporary = path.with_name(f".{path.name}.new")
  with open(temporary, "wb") as file:
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
