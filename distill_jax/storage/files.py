"""Files that are whole at any moment, whenever a run is killed."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
  """Writes a file under a temporary name beside it, and renames it: a reader sees the old one or the new one."""
  new = path.with_name(f".{path.name}.new")
  with open(new, "wb") as file:
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)
