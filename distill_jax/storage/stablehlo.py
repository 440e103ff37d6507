"""A student as a program that needs no library of ours: `model.stablehlo` beside its weights.

The weights are an argument, not constants: the program stays small (kilobytes) and compiles fast, the weights are on
disk once, and they can be placed, cast or replaced. To run it takes jax, safetensors and flatbuffers:

    weights = safetensors.numpy.load_file("model.safetensors")
    program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
    logits = jax.jit(program.call)(weights, {"image": images})["logits"]
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import safetensors.flax

from distill_jax.errors import suggest
from distill_jax.storage import files
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.storage.student import WEIGHTS
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Outputs, Variables

PROGRAM, SIGNATURE = "model.stablehlo", "model.stablehlo.json"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
  folder: str | os.PathLike,
  model: Model,
  variables: Variables,
  batch: Batch,
  *,
  outputs: Sequence[str] = ("logits",),
  platforms: Sequence[str] = PLATFORMS,
) -> Path:
  """Write the evaluation of a model, for any batch size, beside the weights that `export_student` wrote.

  Two files: `model.stablehlo`, what `jax.export` serializes (read by later versions of jax for at least 6 months),
  and `model.stablehlo.json`, its signature in words, with a checksum.

  Args:
    folder: made if it is missing.
    model: only its `apply` with `train=False, key=None` is used.
    variables: the student's; names, shapes and dtypes count, and their fingerprint is written down.
    batch: an example batch, arrays or `ShapeDtypeStruct`s, rows first. What the outputs do not need of it (labels,
      ids) is no argument of the program.
    outputs: what the program returns, a mapping of these.
    platforms: what it is lowered for.

  Returns:
    The path of the program.

  Raises:
    ValueError: the model has no such output, or cannot be traced for a batch of unknown size.
  """
  folder = Path(folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  weights = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named_leaves(variables)
  }
  structure = jax.tree.structure(variables)

  def predict(weights, batch):
    own = jax.tree.unflatten(structure, [weights[name] for name, _ in named_leaves(variables)])
    made = model.apply(*own, batch, train=False, key=None)[0]
    for name in outputs:
      if name not in made:
        raise ValueError(f"outputs: the model has no {name!r}{suggest(name, made)}")
    return {name: made[name] for name in outputs}

  needed = _needed(jax.jit(predict), weights, batch)
  try:
    exported = jax.export.export(jax.jit(predict), platforms=platforms)(weights, needed)
  except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
    if isinstance(error, TypeError) and "_DimExpr" not in str(error):
      raise
    raise ValueError(
      "the model cannot be exported for a batch of any size: it takes the size for a number (a branch on it; or"
      f" len(x), for which x.shape[0] will do): {error}"
    ) from error
  program = bytes(exported.serialize())
  signature = {
    "inputs": {name: _show(x) for name, x in needed.items()},
    "outputs": {name: _show(x) for name, x in _outputs(exported).items()},
    "platforms": exported.platforms,
    "jax": jax.__version__,
    "fingerprint": fingerprint(variables),
    "sha256": hashlib.sha256(program).hexdigest(),
  }
  files.write(folder / PROGRAM, program)
  files.write(folder / SIGNATURE, json.dumps(signature, indent=2))
  return folder / PROGRAM


def load_stablehlo(folder: str | os.PathLike) -> Callable[[Batch], Outputs]:
  """`predict(batch) -> outputs` of what `export_stablehlo` and `export_student` wrote into the folder.

  It is compiled once for each batch size, and takes from the batch what the program needs.

  Raises:
    FileNotFoundError: one of the files is missing.
    ValueError: one of them is damaged, or they are of different exports; by `predict`: the batch lacks an entry.
  """
  folder = Path(folder).absolute()
  for name in (PROGRAM, SIGNATURE, WEIGHTS):
    if not (folder / name).is_file():
      writer = "export_student" if name == WEIGHTS else "export_stablehlo"
      raise FileNotFoundError(f"no {name} in {folder}: {writer} writes it")
  program, signature = (folder / PROGRAM).read_bytes(), _signature(folder / SIGNATURE)
  if hashlib.sha256(program).hexdigest() != signature["sha256"]:
    raise ValueError(f"{folder / PROGRAM} is damaged, or of another export than {SIGNATURE}")
  try:
    weights = safetensors.flax.load_file(folder / WEIGHTS)
  except (
    Exception
  ) as error:  # the Rust parser raises SafetensorError, the wrapper KeyError and ValueError
    raise ValueError(f"{folder / WEIGHTS} is damaged or no safetensors file: {error}") from error
  if fingerprint(weights) != signature["fingerprint"]:
    raise ValueError(
      f"{folder / WEIGHTS} is damaged, or of another export than {PROGRAM}: export both again"
    )
  exported = jax.export.deserialize(bytearray(program))
  inputs, call = sorted(_inputs(exported)), jax.jit(exported.call)

  def predict(batch: Batch) -> Outputs:
    for name in inputs:
      if name not in batch:
        raise ValueError(f"the batch has no entry {name!r}{suggest(name, batch)}")
    return call(weights, {name: batch[name] for name in inputs})

  return predict


def _needed(predict, weights, batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
  """What `predict` uses of the batch, with any number of rows."""
  # A program for any number of rows keeps every argument; one for this number drops those that it does not use.
  rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  kept = jax.export.export(predict, platforms=["cpu"])(weights, rows).module_kept_var_idx
  (size,) = jax.export.symbolic_shape("batch")
  names = [name for i, name in enumerate(sorted(rows), len(weights)) if i in kept]
  return {
    name: jax.ShapeDtypeStruct((size, *rows[name].shape[1:]), rows[name].dtype) for name in names
  }


def _inputs(exported: jax.export.Exported) -> dict[str, Any]:
  return jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][1]


def _outputs(exported: jax.export.Exported) -> dict[str, Any]:
  return jax.tree.unflatten(exported.out_tree, exported.out_avals)


def _signature(path: Path) -> dict[str, Any]:
  try:
    signature = json.loads(path.read_bytes())
    return {"sha256": signature["sha256"], "fingerprint": signature["fingerprint"]}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged: {error!r}") from error


def _show(leaf: Any) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
