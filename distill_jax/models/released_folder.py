"""Opens folders of released networks: config.json next to model.safetensors, or its index."""

from pathlib import Path
from typing import Any

import safetensors

from distill_jax.models.weights import entries_of_index
from distill_jax.storage import files, unique_names
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
_INDEX = "model.safetensors.index.json"


def read_settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
  """Returns the members of config.json, or of another file of the folder.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is corrupt.
  """
  try:
    return unique_names.loads(files.read(folder / name))
  except ValueError as error:
    raise ValueError(f"folder: {folder / name} is corrupt: {error}") from error


def weights_path(folder: Path) -> Path:
  """Returns the path of the weights, or of the index of weights in several files."""
  path = folder / WEIGHTS
  return folder / _INDEX if not path.exists() and (folder / _INDEX).exists() else path


def entries_of(path: Path) -> set[str]:
  """Returns the names of the entries of a file of weights, or of all files of an index.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: it is corrupt.
  """
  if path.name == _INDEX:
    return set(entries_of_index(path))
  if not path.is_file():
    raise FileNotFoundError(f"folder: expected {path.name} in {path.parent}, got none")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return set(file.keys())
  except safetensors.SafetensorError as error:
    raise ValueError(f"path: {path} is corrupt: {error}") from error


def check_same_shapes(params: Tree, expected: Tree) -> None:
  """Checks parameters that are to be written against those of the network that a config describes.

  Raises:
    ValueError: one is missing, unexpected or of another shape.
  """
  shapes, others = ({n: x.shape for n, x in named_leaves(tree)} for tree in (params, expected))
  for name in sorted(shapes.keys() | others.keys()):
    if shapes.get(name) != others.get(name):
      raise ValueError(
        f"variables: expected {name} {others.get(name, 'not at all')} by the config, got "
        f"{shapes.get(name, 'nothing')}: pass the config of the trained network"
      )
