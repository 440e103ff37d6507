"""Loads released weights from .safetensors or .npz files into a network. Pickled files are never
opened."""

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from distill_jax.errors import suggest
from distill_jax.storage import files, folders, unique_names
from distill_jax.trees import describe_leaf, named_leaves
from distill_jax.types import Batch, Model, Tree, Variables

_INDEX = ".safetensors.index.json"
# Weights hardly shrink when they are compressed, but zeros and small files may.
_MAX_EXPANSION = 64
_ANY_SIZE = 2**26
Origin = str | tuple[str, Callable[[np.ndarray], np.ndarray]]
Names = Mapping[str, Origin] | Callable[[str], Origin]


def load_weights(
  path: str | os.PathLike,
  like: Tree,
  *,
  names: Names | None = None,
  ignore: Sequence[str] = (),
  cast: bool = False,
) -> Tree:
  """Returns the arrays of a file in the tree of a network.

  Args:
    path: a .safetensors or .npz file; or the model.safetensors.index.json of a checkpoint in
      several files.
    like: the tree to fill: `Variables`, or any tree of arrays or `ShapeDtypeStruct`s.
    names: the entry of each leaf: `{leaf: entry}`, or a function from leaf to entry. Leaves are
      paths such as 'params/head/kernel'. Instead of an entry's name there may be `(name,
      function)`: the function converts the entry's array into the leaf's (`torch_kernel`, a slice
      of packed projections). Several leaves may use one entry. Leaves that a mapping does not have
      are entries of the same name, and so are all leaves if it is None.
    ignore: patterns ('*.num_batches_tracked') of entries that need not be used.
    cast: whether to convert floating types to floating ones and integers to integers; else another
      dtype is an error.

  Returns:
    A tree of the structure of `like`, of new arrays.

  Raises:
    FileNotFoundError: the file, or one that the index names, does not exist.
    ValueError: a file of another kind or a corrupt one; a key of `names` that is no leaf; or
      entries that do not fit: the message has a line for each that is missing, unexpected, or of
      another shape or dtype.

  >>> names = {"params/head/kernel": ("fc.weight", torch_kernel)}
  >>> load_weights(path, like, names=names)  # doctest: +SKIP
  """
  path = folders.resolve(path, "path")
  leaves = dict(named_leaves(like))
  if isinstance(names, Mapping):
    for name in names:
      if name not in leaves:
        raise ValueError(f"names: expected paths of leaves, got {name!r}{suggest(name, leaves)}")
  entries = _read(path)
  origins = {name: _origin(names, name) for name in leaves}
  values = {}
  lines = []
  for name, leaf in leaves.items():
    try:
      values[name] = _fit(entries, origins, name, leaf, cast)
    except _Misfit as misfit:
      lines.append(f"\n  {misfit}")
  lines += _unexpected(entries, origins, ignore)
  if lines:
    raise ValueError(f"path: {path} does not fit the network:{''.join(sorted(lines))}")
  return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(values[name]) for name in leaves])


def pretrained(
  model: Model,
  path: str | os.PathLike,
  batch: Batch | None = None,
  *,
  names: Names | None = None,
  ignore: Sequence[str] = (),
  cast: bool = False,
) -> Model:
  """Returns the model with weights from a file: a teacher, or a student that starts from them.

  Args:
    model: any Model; the leaves are those of its `variables`, or of what its `init` returns.
    path, names, ignore, cast: as in `load_weights`.
    batch: an example batch for `init` (arrays or `ShapeDtypeStruct`s), for a model without
      `variables`.

  Raises:
    FileNotFoundError, ValueError: as `load_weights`; or neither `variables` nor a batch.

  >>> import pathlib, tempfile
  >>> from distill_jax import models
  >>> path = pathlib.Path(tempfile.mkdtemp(), "teacher.npz")
  >>> np.savez(path, **{"params/kernel": np.full((2, 2), 7, np.float32)})
  >>> init = lambda key, x: {"kernel": jnp.zeros((2, 2))}
  >>> model = models.from_apply(init, lambda params, x: x @ params["kernel"], inputs="x")
  >>> teacher = models.pretrained(model, path, {"x": jax.ShapeDtypeStruct((1, 2), jnp.float32)})
  >>> teacher.variables.params["kernel"][0]
  Array([7., 7.], dtype=float32)
  """
  like = model.variables
  if like is None:
    if batch is None:
      raise ValueError("batch: expected an example batch for a model without variables, got None")
    like = jax.eval_shape(model.init, jax.random.key(0), batch)
  variables: Variables = load_weights(path, like, names=names, ignore=ignore, cast=cast)

  def init(key: jax.Array, batch: Batch) -> Variables:
    del key, batch
    return Variables(*jax.tree.map(jnp.copy, tuple(variables)))

  return model._replace(init=init, variables=variables)


def torch_kernel(weight: np.ndarray) -> np.ndarray:
  """Returns PyTorch's weight of a Linear or Conv layer as a kernel.

  The layout of a ConvTranspose differs.

  Args:
    weight: [outputs, inputs, *window].

  Returns:
    [*window, inputs, outputs].

  Raises:
    ValueError: fewer than two axes.

  >>> torch_kernel(np.zeros((10, 4))).shape  # Linear
  (4, 10)
  >>> torch_kernel(np.zeros((32, 3, 5, 5))).shape  # Conv
  (5, 5, 3, 32)
  """
  if weight.ndim < 2:
    raise ValueError(f"weight: expected [outputs, inputs, ...], got {weight.shape}")
  return weight.transpose(*range(2, weight.ndim), 1, 0)


class _Misfit(Exception):
  """An entry that does not fit its leaf; the message is a line of the error."""


def _origin(names: Names | None, name: str) -> tuple[str, Callable | None]:
  origin = names(name) if callable(names) else (names or {}).get(name, name)
  return (origin, None) if isinstance(origin, str) else origin


def _fit(entries, origins, name: str, leaf: Any, cast: bool) -> np.ndarray:
  """Returns the leaf's entry in its shape and dtype."""
  entry, convert = origins[name]
  if entry not in entries:
    spare = entries.keys() - {origin for origin, _ in origins.values()}
    hint = suggest(entry, spare) if spare else ""
    raise _Misfit(f"missing: {entry}, for {name} {_describe(leaf)}{hint}")
  value = entries[entry]
  label = f"{name} <- {entry}"
  if convert is not None:
    try:
      value = np.asarray(convert(value))
    except Exception as error:
      raise _Misfit(f"function: {label} {_describe(value)}: {error}") from error
  if value.shape != leaf.shape:
    fits_transposed = value.ndim > 1 and torch_kernel(value).shape == leaf.shape
    hint = "; use torch_kernel" if fits_transposed and convert is None else ""
    raise _Misfit(f"shape: {label} is {_describe(value)}, expected {_describe(leaf)}{hint}")
  return value if value.dtype == leaf.dtype else _cast(value, leaf, label, cast)


def _cast(value: np.ndarray, leaf: Any, label: str, cast: bool) -> np.ndarray:
  if not _same_kind(value.dtype, leaf.dtype):
    raise _Misfit(f"dtype: {label} is {_describe(value)}, expected {_describe(leaf)}")
  if not cast:
    raise _Misfit(f"dtype: {label} is {_describe(value)}, expected {_describe(leaf)}; use cast")
  with np.errstate(all="ignore"):
    converted = value.astype(leaf.dtype)
    if _floating(value.dtype):
      overflow = (~np.isfinite(converted) & np.isfinite(value)).any()
    else:
      overflow = (converted != value).any()
  if overflow:
    raise _Misfit(f"dtype: {label} is {_describe(value)} with values outside {leaf.dtype}")
  return converted


def _unexpected(entries, origins, ignore: Sequence[str]) -> list[str]:
  used = {origin for origin, _ in origins.values()}
  return [
    f"\n  unexpected: {name} {_describe(entries[name])}: use it, or add it to ignore"
    for name in entries.keys() - used
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
  ]


def _describe(leaf: Any) -> str:
  return describe_leaf(leaf.shape, leaf.dtype)


def _same_kind(a, b) -> bool:
  kinds = (jnp.floating, jnp.integer)
  return any(jnp.issubdtype(a, kind) and jnp.issubdtype(b, kind) for kind in kinds)


def _floating(dtype) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def _read(path: Path) -> dict[str, np.ndarray]:
  if path.name.endswith(_INDEX) and path.is_file():
    return _read_parts(path)
  if path.suffix not in (".safetensors", ".npz") and not path.name.endswith(_INDEX):
    raise ValueError(f"path: expected a .safetensors or .npz file (never a pickle), got {path}")
  if not path.is_file():
    state = "is no regular file" if os.path.lexists(path) else "does not exist"
    raise FileNotFoundError(f"path: expected a file, got {path}, which {state}")
  try:
    if path.suffix == ".npz":
      with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as archive:
        _check_archive(archive, path.stat().st_size)
        return _plain_arrays(archive)
    unique_names.check_names(path)
    with safetensors.safe_open(path, framework="numpy") as file:
      return {name: file.get_tensor(name) for name in file.keys()}
  except Exception as error:  # zipfile, numpy and the Rust parser raise many kinds.
    raise ValueError(f"path: {path} is corrupt, or has more than plain arrays: {error}") from error


def _plain_arrays(archive: Any) -> dict[str, np.ndarray]:
  arrays = {name: archive[name] for name in archive.files}
  for name, value in arrays.items():
    if not isinstance(value, np.ndarray):  # numpy returns the bytes of other members.
      raise ValueError(f"{name!r} is no array")
  return arrays


def _check_archive(archive: Any, file_size: int) -> None:
  names = archive.files
  doubled = sorted({name for name in names if names.count(name) > 1})
  if doubled:
    raise ValueError(f"it has two arrays of the name {doubled[0]!r}")
  size = sum(member.file_size for member in archive.zip.infolist())
  if size > _MAX_EXPANSION * file_size + _ANY_SIZE:
    raise ValueError(f"its {file_size:,} bytes would become {size:,}: it is a decompression bomb")


def _read_parts(index: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of all the files that an index names."""
  file_of_entry = entries_of_index(index)
  parts = {file: _read(index.parent / file) for file in sorted(set(file_of_entry.values()))}
  for name, file in file_of_entry.items():
    if name not in parts[file]:
      raise ValueError(f"path: {index} expects {name} in {file}, which does not have it")
  return {name: value for part in parts.values() for name, value in part.items()}


def entries_of_index(index: Path) -> dict[str, str]:
  """Returns {entry: file} of the index of a checkpoint in several files, next to which they are.

  Raises:
    ValueError: it is no index, or an entry is in no file next to it.
  """
  try:
    content = unique_names.loads(files.read(index))
  except ValueError as error:
    raise ValueError(f"path: {index} is corrupt: {error}") from error
  file_of_entry = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(file_of_entry, dict):
    raise ValueError(
      f"path: {index} is corrupt: expected {{entry: file}} as 'weight_map', got "
      f"{file_of_entry!r:.80}"
    )
  for name, file in file_of_entry.items():
    if not isinstance(file, str) or Path(file).name != file:
      raise ValueError(
        f"path: {index} is corrupt: expected a file next to it for {name!r}, got {file!r:.80}"
      )
    if file.endswith(_INDEX):
      raise ValueError(
        f"path: {index} is corrupt: expected a file of weights for {name!r}, got the index {file!r}"
      )
  return file_of_entry
