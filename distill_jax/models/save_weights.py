"""Writes the weights of a network to a safetensors file under the names of another library."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from distill_jax.storage import files, folders
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Target = str | tuple[str, Callable[[np.ndarray], np.ndarray]]


def save_weights(
  path: str | os.PathLike,
  tree: Tree,
  *,
  names: Mapping[str, Target] | Callable[[str], Target] | None = None,
) -> Path:
  """Writes the arrays of a tree, for PyTorch or any reader of safetensors; `load_weights` reads it.

  Args:
    path: a .safetensors file, which is replaced atomically; its folder must exist.
    tree: `Variables`, or any tree of arrays.
    names: the entry of each leaf, as in `load_weights`; with `(entry, function)`, the function
      converts the leaf's array into the entry's. A kernel [inputs, outputs] goes with
      `np.transpose`.

  Returns:
    The path, absolute.

  Raises:
    ValueError: another kind of file, or two leaves with one entry.
    OSError: the file cannot be written.

  >>> import pathlib, tempfile
  >>> import safetensors.numpy
  >>> from distill_jax import models
  >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
  >>> names = {"kernel": ("fc.weight", np.transpose)}
  >>> path = models.save_weights(path, {"kernel": np.zeros((3, 2), np.float32)}, names=names)
  >>> {name: x.shape for name, x in safetensors.numpy.load_file(path).items()}
  {'fc.weight': (2, 3)}
  """
  path = folders.resolve(path, "path")
  if path.suffix != ".safetensors":
    raise ValueError(f"path: expected a .safetensors file, got {path}")
  arrays: dict[str, np.ndarray] = {}
  for leaf, value in named_leaves(tree):
    target = names(leaf) if callable(names) else (names or {}).get(leaf, leaf)
    entry, convert = (target, None) if isinstance(target, str) else target
    if entry in arrays:
      raise ValueError(
        f"names: expected one leaf for each entry, got a second for {entry!r}: {leaf}"
      )
    array = np.asarray(value)
    arrays[entry] = np.ascontiguousarray(array if convert is None else convert(array))
  # Readers of Hugging Face require the format.
  files.write(path, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
  return path
