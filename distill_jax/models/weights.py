"""Released weights, from .safetensors or .npz files, for a network of ours. Pickled files are never opened."""

import fnmatch
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Tree, Variables

_INDEX = ".safetensors.index.json"
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
  """The arrays of a file in the tree of a network.

  Args:
    path: a .safetensors or an .npz file; or, of a checkpoint in several files, its model.safetensors.index.json.
    like: the tree to fill: `Variables`, or any tree of arrays or `ShapeDtypeStruct`s.
    names: where each leaf comes from: `{our name: theirs}`, or a function from our name to theirs. Ours are paths,
      'params/head/kernel'. In place of their name there may be `(their name, function)`: the function turns their
      array into ours (`torch_kernel`, a slice of packed projections). Several leaves may come from one array.
      Leaves that a mapping does not name have the same name in the file, and so have all leaves where it is None.
    ignore: patterns ('*.num_batches_tracked') of entries of the file that nobody has to use.
    cast: convert floating types to floating and integers to integers; otherwise a dtype that differs is an error.

  Returns:
    A tree of the structure of `like`, of new arrays.

  Raises:
    FileNotFoundError: there is no such file, or none that the index names.
    ValueError: it is of another kind, or is damaged; `names` names no leaf of ours; or entries do not fit:
      each that is missing, unexpected, or of another shape or dtype has a line.

  >>> load_weights(path, like, names={"params/head/kernel": ("fc.weight", torch_kernel)})  # doctest: +SKIP
  """
  leaves, path = dict(named_leaves(like)), Path(path)
  if isinstance(names, Mapping):
    for name in names:
      if name not in leaves:
        raise ValueError(f"names: the network has no leaf {name!r}{suggest(name, leaves)}")
  found = _read(path)
  origins = {name: _origin(names, name) for name in leaves}
  values, lines = {}, []
  for name, leaf in leaves.items():
    try:
      values[name] = _fitted(found, origins, name, leaf, cast)
    except _Misfit as shape_mismatch:
      lines.append(f"\n  {shape_mismatch}")
  used = {theirs for theirs, _ in origins.values()}
  for name in found.keys() - used:
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
      lines.append(
        f"\n  unexpected: {name} {_show(found[name])}: nothing takes it, nor is it in ignore"
      )
  if lines:
    raise ValueError(f"{path} does not fit:{''.join(sorted(lines))}")
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
  """The model with weights from a file: a teacher, or a student that starts from them.

  Args:
    model: decides names, shapes and dtypes: by its `variables`, or by what its `init` would make.
    path, names, ignore, cast: as in `load_weights`.
    batch: an example batch for `init` (arrays or `ShapeDtypeStruct`s), where the model has no `variables`.

  Raises:
    FileNotFoundError, ValueError: as `load_weights`; or there is nothing to learn the shapes from.
  """
  like = model.variables
  if like is None:
    if batch is None:
      raise ValueError(
        "the model holds no variables: give batch=, an example batch, to learn its shapes from"
      )
    like = jax.eval_shape(model.init, jax.random.key(0), batch)
  loaded: Variables = load_weights(path, like, names=names, ignore=ignore, cast=cast)

  def init(key: jax.Array, batch: Batch) -> Variables:
    del key, batch
    return Variables(*jax.tree.map(jnp.copy, tuple(loaded)))

  return model._replace(init=init, variables=loaded)


def torch_kernel(weight: np.ndarray) -> np.ndarray:
  """PyTorch's weight of a Linear or Conv layer [outputs, inputs, *window] as a kernel [*window, inputs, outputs].

  Those of ConvTranspose are laid out otherwise. Raises ValueError for fewer than two axes.
  """
  if weight.ndim < 2:
    raise ValueError(f"expected a weight [outputs, inputs, ...], got {weight.shape}")
  return weight.transpose(*range(2, weight.ndim), 1, 0)


class _Misfit(Exception):
  pass


def _origin(names: Names | None, name: str) -> tuple[str, Callable | None]:
  origin = names(name) if callable(names) else (names or {}).get(name, name)
  return (origin, None) if isinstance(origin, str) else origin


def _fitted(found, origins, name: str, leaf: Any, cast: bool) -> np.ndarray:
  theirs, change = origins[name]
  if theirs not in found:
    spare = found.keys() - {origin for origin, _ in origins.values()}
    hint = suggest(theirs, spare) if spare else ""
    raise _Misfit(f"missing: {theirs}, for {name} {_show(leaf)}{hint}")
  value, label = found[theirs], f"{name} <- {theirs}"
  if change is not None:
    try:
      value = np.asarray(change(value))
    except Exception as error:
      raise _Misfit(f"function: {label} {_show(value)}: {error}") from error
  if value.shape != leaf.shape:
    flipped = value.ndim > 1 and torch_kernel(value).shape == leaf.shape
    hint = "; torch_kernel makes it that" if flipped and change is None else ""
    raise _Misfit(f"shape: {label} is {_show(value)}, expected {_show(leaf)}{hint}")
  if value.dtype == leaf.dtype:
    return value
  if not _same_kind(value.dtype, leaf.dtype):
    raise _Misfit(f"dtype: {label} is {_show(value)}, expected {_show(leaf)}")
  if not cast:
    raise _Misfit(
      f"dtype: {label} is {_show(value)}, expected {_show(leaf)}; cast=True converts it"
    )
  with np.errstate(all="ignore"):
    converted = value.astype(leaf.dtype)
    lost = (
      int((~np.isfinite(converted) & np.isfinite(value)).sum()) if _floating(value.dtype) else 0
    )
  if lost or (not _floating(value.dtype) and (converted != value).any()):
    raise _Misfit(f"dtype: {label} is {_show(value)} and has values that {leaf.dtype} has not")
  return converted


def _same_kind(a, b) -> bool:
  return any(
    jnp.issubdtype(a, kind) and jnp.issubdtype(b, kind) for kind in (jnp.floating, jnp.integer)
  )


def _floating(dtype) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def _read(path: Path) -> dict[str, np.ndarray]:
  if path.name.endswith(_INDEX) and path.is_file():
    return _read_parts(path)
  if path.suffix not in (".safetensors", ".npz"):
    raise ValueError(f"{path} is no .safetensors or .npz file; pickled weights are never opened")
  if not path.is_file():
    raise FileNotFoundError(f"no file {path}")
  try:
    if path.suffix == ".npz":
      with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
    with safetensors.safe_open(path, framework="numpy") as file:
      return {name: file.get_tensor(name) for name in file.keys()}
  except Exception as error:  # zipfile, numpy and the Rust parser raise many kinds
    raise ValueError(f"{path} is damaged, or holds more than plain arrays: {error}") from error


def _read_parts(index: Path) -> dict[str, np.ndarray]:
  """The arrays of all the files beside an index that it names."""
  try:
    files = json.loads(index.read_text())["weight_map"]
    names = sorted(set(files.values()))
    if any(Path(name).name != name for name in names):
      raise ValueError("it names files that do not lie beside it")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index} is damaged: {error!r}") from error
  parts = {file: _read(index.parent / file) for file in names}
  for name, file in files.items():
    if name not in parts[file]:
      raise ValueError(f"{index}: {file} has no {name}")
  return {name: value for part in parts.values() for name, value in part.items()}


def _show(leaf: Any) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
