"""Exports a student as a program that runs without this library, next to its weights.

The weights are an argument, not constants: the program stays small (kilobytes) and compiles fast,
the weights are on disk once, and they can be placed, cast or replaced. To run it takes jax,
safetensors and flatbuffers:

    weights = safetensors.numpy.load_file("model.safetensors")
    program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
    logits = jax.jit(program.call)(weights, {"image": images})["logits"]
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export

from distill_jax import compat
from distill_jax.errors import suggest
from distill_jax.storage import files, folders, sealed_json
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.storage.inputs import check_inputs, check_shapes
from distill_jax.storage.student import WEIGHTS, load_weights, read_inputs
from distill_jax.trees import batch_specs, describe_leaf, named_leaves
from distill_jax.types import Batch, Model, Outputs, Variables

PROGRAM, SIGNATURE = "model.stablehlo", "model.stablehlo.json"
PLATFORMS = ("cpu", "cuda", "tpu")

_Predict = Callable[[dict[str, jax.Array], Batch], Outputs]
"""`(weights by name, batch) -> outputs`."""


def export_stablehlo(
  model: Model,
  variables: Variables,
  batch: Batch,
  folder: str | os.PathLike,
  *,
  outputs: Sequence[str] | None = None,
  platforms: Sequence[str] = PLATFORMS,
) -> Path:
  """Writes the evaluation of a model, for any batch size, next to its exported weights.

  There are two files: `model.stablehlo`, serialized by `jax.export` (read by later versions of jax
  for at least 6 months), and `model.stablehlo.json`, its signature as text, with a checksum.

  Args:
    model: only its `apply` with `train=False, key=None` is used.
    variables: the student's; names, shapes and dtypes matter, and their fingerprint is stored.
    batch: an example batch, arrays or `ShapeDtypeStruct`s, rows first. Entries that the outputs do
      not depend on (labels, ids) are no arguments of the program.
    folder: created if it is missing.
    outputs: names of the model's outputs that the program returns, as a mapping; None: all arrays
      with a row per example, every head and feature.
    platforms: platforms that the program is lowered for.

  Returns:
    The path of the program.

  Raises:
    ValueError: the model has no such output, or cannot be traced for a batch of unknown size.
  """
  folder = folders.resolve(folder, "folder")
  folder.mkdir(parents=True, exist_ok=True)
  weights = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named_leaves(variables)
  }
  entries = batch_specs(batch)
  predict = _predict_fn(model, variables, outputs or _row_outputs(model, variables, entries))
  inputs = _used_inputs(predict, weights, entries)
  exported = _export(predict, weights, inputs, platforms)
  program = bytes(exported.serialize())
  signature = {
    "inputs": _describe(inputs),
    "outputs": _describe(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
    "platforms": exported.platforms,
    "jax": jax.__version__,
    "fingerprint": fingerprint(variables),
    "sha256": hashlib.sha256(program).hexdigest(),
  }
  files.write(folder / PROGRAM, program)
  files.write(folder / SIGNATURE, sealed_json.dumps(signature, indent=2))
  return folder / PROGRAM


def load_stablehlo(folder: str | os.PathLike) -> Callable[[Batch], Outputs]:
  """Returns `predict(batch) -> outputs` of an exported program and weights.

  It is compiled once for each batch size, and ignores entries of the batch that the program does
  not need. If `export_student` stored the inputs of training, a batch of another range warns.

  Raises:
    FileNotFoundError: one of the files is missing.
    ValueError: one of them is corrupt, or they are of different exports; by `predict`: the batch
      lacks an entry, or one has another shape or dtype.
  """
  folder = folders.resolve(folder, "folder")
  for name in (PROGRAM, SIGNATURE, WEIGHTS):
    if not (folder / name).is_file():
      writer = "export_student" if name == WEIGHTS else "export_stablehlo"
      raise FileNotFoundError(f"no {name} in {folder}: {writer} writes it")
  program = (folder / PROGRAM).read_bytes()
  signature = _read_signature(folder / SIGNATURE)
  if hashlib.sha256(program).hexdigest() != signature["sha256"]:
    raise ValueError(
      f"sha256: {folder / PROGRAM} is corrupt, or of another export than {SIGNATURE}: export it "
      "again"
    )
  weights = load_weights(folder / WEIGHTS)
  if fingerprint(weights) != signature["fingerprint"]:
    raise ValueError(
      f"fingerprint: {folder / WEIGHTS} is corrupt, or of another export than {PROGRAM}: export "
      "both again"
    )
  exported = jax.export.deserialize(bytearray(program))
  specs = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][1]
  trained_inputs = read_inputs(folder)
  call = jax.jit(exported.call)

  def predict(batch: Batch) -> Outputs:
    for name in specs:
      if name not in batch:
        raise ValueError(f"batch: expected an entry {name!r}{suggest(name, batch)}")
    used = {name: batch[name] for name in specs}
    check_inputs(trained_inputs, used)
    check_shapes(specs, used)
    return call(weights, used)

  return predict


def _predict_fn(model: Model, variables: Variables, outputs: Sequence[str]) -> _Predict:
  names = [name for name, _ in named_leaves(variables)]
  structure = jax.tree.structure(variables)

  def predict(weights, batch):
    params, state = jax.tree.unflatten(structure, [weights[name] for name in names])
    results = model.apply(params, state, batch, train=False, key=None)[0]
    for name in outputs:
      if name not in results:
        raise ValueError(
          f"outputs: expected one of the model's, got {name!r}{suggest(name, results)}"
        )
    return {name: results[name] for name in outputs}

  return predict


def _row_outputs(model: Model, variables: Variables, batch: Batch) -> list[str]:
  """Returns the names of a model's outputs that are arrays with a row per example."""
  (rows,) = {x.shape[0] for x in batch.values()}
  apply = functools.partial(model.apply, train=False, key=None)
  outputs = jax.eval_shape(lambda v, b: apply(*v, b)[0], variables, batch)
  shapes = {name: getattr(x, "shape", ()) for name, x in outputs.items()}
  return [name for name, shape in shapes.items() if shape[:1] == (rows,)]


def _used_inputs(
  predict: _Predict, weights, entries: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the entries that `predict` uses, with any number of rows."""
  # A program for any number of rows keeps every argument; one for this number drops those that it
  # does not use.
  exported = jax.export.export(jax.jit(predict), platforms=["cpu"])(weights, entries)
  (rows,) = jax.export.symbolic_shape("batch")
  names = [
    name
    for index, name in enumerate(sorted(entries), len(weights))
    if index in exported.module_kept_var_idx
  ]
  return {
    name: jax.ShapeDtypeStruct((rows, *entries[name].shape[1:]), entries[name].dtype)
    for name in names
  }


def _export(predict: _Predict, weights, inputs, platforms: Sequence[str]) -> jax.export.Exported:
  try:
    return jax.export.export(jax.jit(predict), platforms=platforms)(weights, inputs)
  except (compat.inconclusive_dimension_error(), TypeError) as error:
    if isinstance(error, TypeError) and "_DimExpr" not in str(error):
      raise
    raise ValueError(
      "model: expected an apply for any batch size, but it uses the size as a number (in a "
      f"branch, or by len(x): use x.shape[0]): {error}"
    ) from error


def _describe(arrays: dict[str, Any]) -> dict[str, str]:
  return {name: describe_leaf(x.shape, x.dtype) for name, x in arrays.items()}


def _read_signature(path: Path) -> dict[str, Any]:
  try:
    return sealed_json.read(path, "sha256", "fingerprint")
  except ValueError as error:
    raise ValueError(f"{error}: export the program again") from error
