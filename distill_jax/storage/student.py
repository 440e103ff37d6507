"""Exports and loads a student's weights, `model.safetensors`, with a description, `model.json`."""

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

from distill_jax.storage import files, folders, seal, sealed_json
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.storage.inputs import check_description, check_inputs, check_network
from distill_jax.storage.unique_names import check_names
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Variables
from distill_jax.version import __version__

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def export_student(
  variables: Variables,
  folder: str | os.PathLike,
  *,
  description: Mapping[str, Any],
  inputs: Mapping[str, Any] | None = None,
) -> Path:
  """Writes a student's weights only: no optimizer, no teacher, no learned projections.

  Each of the two files is replaced atomically, so a reader never sees half of one. If the process
  is killed between the two, `load_student` reports that they do not belong together.

  Args:
    variables: the student's; leaves are plain arrays, stored bit for bit under their paths
      (`params/...`).
    folder: created if it is missing; may hold other files.
    description: what the student is and how it was trained; any values that json can hold.
    inputs: what it was trained on (`describe_inputs(train)`): shape, dtype and range of each input,
      and the names of the classes. `load_student` and `load_stablehlo` check their batches against
      it. None: nothing is checked.

  Returns:
    The folder, absolute.

  Raises:
    ValueError: no `Variables` (a result, a state, params); a leaf is no plain array (a typed PRNG
      key), or two leaves have one name; a description that json cannot hold; `inputs` that
      `describe_inputs` did not return.

  >>> import tempfile
  >>> from distill_jax import export_student
  >>> from distill_jax.types import Variables
  >>> student = Variables({"kernel": jnp.eye(2)}, {})
  >>> folder = export_student(student, tempfile.mkdtemp(), description={"data": "digits"})
  >>> sorted(path.name for path in folder.iterdir())
  ['model.json', 'model.safetensors']
  """
  if not isinstance(variables, Variables):
    raise ValueError(
      f"variables: expected Variables(params, state), got {type(variables).__name__}: write "
      "result.variables"
    )
  check_description(inputs)
  folder = folders.resolve(folder, "folder")
  folder.mkdir(parents=True, exist_ok=True)
  leaves = seal.layout(variables)
  keys = [name for name, (_, dtype) in leaves.items() if dtype.startswith("key<")]
  if keys:
    raise ValueError(
      f"variables: expected plain arrays, got typed PRNG keys: {', '.join(keys)}: export them "
      "without these leaves"
    )
  versions = {
    "distill_jax": __version__,
    "jax": jax.__version__,
    "safetensors": safetensors.__version__,
    "python": platform.python_version(),
  }
  content = {
    "description": _json_mapping(description),
    "inputs": dict(inputs or {}),
    "fingerprint": fingerprint(variables),
    "leaves": leaves,
    "versions": versions,
  }
  text = sealed_json.dumps(content, indent=2)
  weights = {name: jnp.asarray(leaf) for name, leaf in named_leaves(variables)}
  files.write(folder / WEIGHTS, safetensors.flax.save(weights))
  files.write(folder / DESCRIPTION, text)
  return folder


def load_student(
  path: str | os.PathLike, model: Model, batch: Batch | None = None, *, allow_shrunk: bool = False
) -> Variables:
  """Returns the weights that `export_student` wrote, in the structure of the model's variables.

  Args:
    path: the folder, or its `model.safetensors`.
    model: decides the names, shapes and dtypes: `model.variables`, or what `model.init` returns.
    batch: an example batch for `model.init` (arrays or `ShapeDtypeStruct`s). None: the model has
      `variables`. Arrays of another range than the stored one warn (0 to 255 where 0 to 1 was
      trained), and so do rows of another size that the network takes.
    allow_shrunk: the arrays may have other sizes than the model's (`compression.pruning.shrink`),
      not other names or ranks.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ValueError: the leaves differ from the model's (each difference is listed), the bits differ from
      those that were written, the file is no safetensors file (pickled weights are never opened),
      no Model, or one without variables to compare with, or the batch is not like the training
      examples (`storage.inputs`).

  >>> import tempfile
  >>> from distill_jax import export_student, load_student, models
  >>> linear = lambda w, x: x @ w
  >>> trained = models.from_apply(None, linear, variables=jnp.eye(2), inputs="x")
  >>> folder = export_student(trained.variables, tempfile.mkdtemp(), description={})
  >>> student = models.from_apply(lambda key, x: jnp.zeros((2, 2)), linear, inputs="x")
  >>> load_student(folder, student, {"x": jax.ShapeDtypeStruct((1, 2), jnp.float32)}).params
  Array([[1., 0.],
         [0., 1.]], dtype=float32)
  """
  weights_path, description_path = _files(folders.resolve(path, "path"))
  if not isinstance(model, Model):
    raise ValueError(
      f"model: expected a Model, got {_kind(model)}: make one with models.from_nnx, from_linen, "
      "from_keras or from_apply, as for training"
    )
  if not isinstance(batch, Mapping | None):
    raise ValueError(
      f"batch: expected arrays by name, got {type(batch).__name__}: write {{'image': images}}"
    )
  content = _read_description(description_path)
  stored_fingerprint = content["fingerprint"]
  inputs = content["inputs"]
  check_inputs(inputs, batch or {})
  weights = load_weights(weights_path)
  expected = _variables_of(model, batch)
  if allow_shrunk:
    expected = _with_sizes_of(weights, expected)
  try:
    seal.check_layout(seal.layout(expected), seal.layout(weights))
  except ValueError as error:
    raise ValueError(f"path: the student in {weights_path} is not this model's: {error}") from None
  leaves = [weights[name] for name, _ in named_leaves(expected)]
  variables = jax.tree.unflatten(jax.tree.structure(expected), leaves)
  if fingerprint(variables) != stored_fingerprint:
    raise ValueError(
      f"fingerprint: {weights_path} has {fingerprint(variables)}, {DESCRIPTION} has "
      f"{stored_fingerprint}: one of them "
      "is corrupt or of another export: export the student again"
    )
  if batch is not None:
    check_network(inputs, model, variables, batch)
  return variables


def load_weights(path: Path) -> dict[str, jax.Array]:
  """Returns the arrays of a safetensors file by their names.

  Raises:
    ValueError: it is corrupt, or no safetensors file.
  """
  try:
    check_names(path)
    return safetensors.flax.load_file(path)
  # The Rust parser raises SafetensorError, its wrapper KeyError and ValueError.
  except Exception as error:
    raise ValueError(f"{path} is corrupt, or no safetensors file: {error}") from error


def _kind(network: Any) -> str:
  return f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__


def _json_mapping(description: Any) -> dict[str, Any]:
  try:
    json.dumps(dict(description))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"description: expected a mapping of values that json can hold, got {error}: convert arrays "
      "with float() or .tolist(); {} describes nothing"
    ) from None
  return dict(description)


def _files(path: Path) -> tuple[Path, Path]:
  """Returns the paths of the weights and of the description."""
  if path.is_dir():
    path = path / WEIGHTS
  elif path.is_file() and path.suffix != ".safetensors":
    raise ValueError(
      f"path: expected a .safetensors file, got {path}: pickled weights are never opened"
    )
  for file in (path, path.with_name(DESCRIPTION)):
    if not file.is_file():
      raise FileNotFoundError(
        f"no {file.name} in {file.parent}: export_student writes {WEIGHTS} and {DESCRIPTION}"
      )
  return path, path.with_name(DESCRIPTION)


def read_inputs(folder: str | os.PathLike) -> dict[str, Any]:
  """Returns the description of the inputs that `export_student` stored; {} without one.

  Raises:
    ValueError: the file is corrupt.
  """
  path = folders.resolve(folder, "folder") / DESCRIPTION
  return _read_description(path)["inputs"] if os.path.lexists(path) else {}


def _read_description(path: Path) -> dict[str, Any]:
  try:
    return sealed_json.read(path, "fingerprint", "inputs")
  except ValueError as error:
    raise ValueError(f"{error}: export the student again") from error


def _variables_of(model: Model, batch: Batch | None) -> Variables:
  """Returns the model's variables, or their shapes."""
  if model.variables is not None:
    return model.variables
  if batch is None:
    raise ValueError("batch: expected an example batch, got None: model.init needs it for shapes")
  return jax.eval_shape(model.init, jax.random.key(0), batch)


def _with_sizes_of(weights: Mapping[str, jax.Array], variables: Variables) -> Variables:
  """Returns the variables' shapes, with the sizes of stored arrays of the same name and rank."""

  def shape(name: str, leaf) -> jax.ShapeDtypeStruct:
    same_rank = name in weights and weights[name].ndim == leaf.ndim
    return jax.ShapeDtypeStruct(weights[name].shape if same_rank else leaf.shape, leaf.dtype)

  leaves = [shape(name, leaf) for name, leaf in named_leaves(variables)]
  return jax.tree.unflatten(jax.tree.structure(variables), leaves)
