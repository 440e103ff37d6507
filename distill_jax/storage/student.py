"""A student on its own: `model.safetensors` and a `model.json` that describes it."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.flax

from distill_jax.storage import files, seal
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Variables
from distill_jax.version import __version__

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def export_student(
  folder: str | os.PathLike, variables: Variables, *, description: Mapping[str, Any]
) -> Path:
  """Write a student's weights alone: no optimizer, no teacher, no learned projections.

  Each of the two files is replaced at once, so a reader never sees half of one; killed between the two,
  `load_student` says that they do not belong together.

  Args:
    folder: made if it is missing; may hold other files.
    variables: the student's; leaves are plain arrays, stored bit for bit under their paths (`params/...`).
    description: what the student is and how it was made; whatever json can hold.

  Returns:
    The folder, absolute.

  Raises:
    ValueError: a leaf is no plain array (a typed PRNG key), or two leaves have one name.
  """
  folder = Path(folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  leaves = seal.layout(variables)
  keys = [name for name, (_, dtype) in leaves.items() if dtype.startswith("key<")]
  if keys:
    raise ValueError(
      f"safetensors holds plain arrays, and these leaves are typed PRNG keys: {', '.join(keys)}"
    )
  text = json.dumps(
    {
      "description": dict(description),
      "fingerprint": fingerprint(variables),
      "leaves": leaves,
      "versions": {
        "distill_jax": __version__,
        "jax": jax.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
      },
    },
    indent=2,
  )
  weights = {name: jnp.asarray(leaf) for name, leaf in named_leaves(variables)}
  files.write(folder / WEIGHTS, safetensors.flax.save(weights))
  files.write(folder / DESCRIPTION, text)
  return folder


def load_student(
  path: str | os.PathLike, model: Model, batch: Batch | None = None, *, allow_shrunk: bool = False
) -> Variables:
  """The weights that `export_student` wrote, in the model's own tree.

  Args:
    path: the folder, or its `model.safetensors`.
    model: decides the names, shapes and dtypes: `model.variables`, or what `model.init` would make.
    batch: an example batch for `model.init` (arrays or `ShapeDtypeStruct`s); not needed where the model has
      `variables`.
    allow_shrunk: the arrays may have other sizes than the model's (`compression.shrink`), not other names or ranks.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ValueError: the leaves differ from the model's (each difference is listed), the bits differ from those
      that were written, the file is no safetensors file (pickled weights are never opened), or there is
      nothing to compare with.
  """
  weights, description = _files(Path(path).absolute())
  try:
    expected = json.loads(description.read_bytes())["fingerprint"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{description} is damaged: {error!r}") from error
  try:
    found = safetensors.flax.load_file(weights)
  except (
    Exception
  ) as error:  # the Rust parser raises SafetensorError, the wrapper KeyError and ValueError
    raise ValueError(f"{weights} is damaged or no safetensors file: {error}") from error
  own = _own_tree(model, batch)
  if allow_shrunk:
    own = _with_sizes(own, found)
  try:
    seal.check_fit(seal.layout(own), seal.layout(found))
  except ValueError as error:
    raise ValueError(f"the student in {weights} is not this model's: {error}") from None
  names = [name for name, _ in named_leaves(own)]
  variables = jax.tree.unflatten(jax.tree.structure(own), [found[name] for name in names])
  if fingerprint(variables) != expected:
    raise ValueError(
      f"{weights} is damaged, or belongs to another export than {DESCRIPTION}: its fingerprint is"
      f" {fingerprint(variables)}, {DESCRIPTION} says {expected}. Export it again."
    )
  return variables


def _with_sizes(own: Variables, found: Mapping[str, Any]) -> Variables:
  """The tree's shapes, with the sizes of arrays of the same name and rank."""

  def shape(name, leaf):
    same = name in found and found[name].ndim == leaf.ndim
    return jax.ShapeDtypeStruct(found[name].shape if same else leaf.shape, leaf.dtype)

  leaves = [shape(name, leaf) for name, leaf in named_leaves(own)]
  return jax.tree.unflatten(jax.tree.structure(own), leaves)


def _own_tree(model: Model, batch: Batch | None) -> Variables:
  if model.variables is not None:
    return model.variables
  if batch is None:
    raise ValueError(
      "the model holds no variables: give batch=, an example batch, to learn its shapes from"
    )
  return jax.eval_shape(model.init, jax.random.key(0), batch)


def _files(path: Path) -> tuple[Path, Path]:
  if path.is_dir():
    path = path / WEIGHTS
  elif path.is_file() and path.suffix != ".safetensors":
    raise ValueError(f"{path} is no .safetensors file; pickled weights are never opened")
  for file in (path, path.with_name(DESCRIPTION)):
    if not file.is_file():
      raise FileNotFoundError(
        f"no {file.name} in {file.parent}: export_student writes {WEIGHTS} and {DESCRIPTION}"
      )
  return path, path.with_name(DESCRIPTION)
