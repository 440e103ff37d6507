"""Writes and reads small sets of arrays in NumPy's format npz, for data that is prepared once."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.storage import files


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays into a file, whose folder is created; a killed run leaves none.

  >>> import tempfile
  >>> path = Path(tempfile.mkdtemp(), "numbers.npz")
  >>> write_arrays(path, {"x": np.arange(3)})
  >>> read_arrays(path, ["x"])
  {'x': array([0, 1, 2])}
  """
  content = io.BytesIO()
  np.savez(content, **dict(arrays))
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, content.getvalue())


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns the named arrays of a file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no such file, or lacks an array.
  """
  content = files.read(path)
  try:
    with np.load(io.BytesIO(content)) as stored:
      return {name: stored[name] for name in names}
  except (zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError) as error:
    raise ValueError(
      f"path: expected a whole file of {list(names)}, got another one in {path}: delete it"
    ) from error
