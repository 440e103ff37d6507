"""Selects a network's inputs from a batch and names its outputs: shared by all adapters.
 A network may return an array (the logits), a mapping of named outputs, or `(logits, mapping)`; all
three become `Outputs`. What it does not return can be captured by the path of the submodule that
computes it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.errors import suggest
from distill_jax.types import Batch

AUXILIARY_LOSS = "auxiliary_loss"
"""Output of a network in training: the sum of the losses that its layers add, a scalar."""

Features = Mapping[str, str] | Sequence[str]


def select_inputs(batch: Batch, inputs: str | Sequence[str]) -> tuple[jax.Array, ...]:
  """Returns the entries of the batch that a network takes, in order.

  Raises:
    ValueError: the batch does not have one.
  """
  names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
  for name in names:
    if name not in batch:
      hint = suggest(name, batch)
      raise ValueError(
        f"inputs: expected an entry of the batch, got {name!r}{hint} (inputs= of from_nnx and the "
        "other adapters names what a network takes)"
      )
  return tuple(batch[name] for name in names)


def as_outputs(result: Any) -> dict[str, Any]:
  """Returns what a network returned as named outputs; entries that are None are left out.

  Raises:
    ValueError: it is no array with rows, mapping, NamedTuple or (array, mapping), or an output
      holds no arrays.
  """
  if isinstance(result, Mapping):
    outputs = dict(result)
  elif hasattr(result, "_asdict"):
    outputs = result._asdict()
  elif isinstance(result, (jax.Array, np.ndarray)):
    outputs = {"logits": result}
  elif isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
    outputs = {"logits": result[0], **result[1]}
  else:
    raise ValueError(
      "outputs: expected logits, a mapping of outputs, or (logits, mapping), got "
      f"{_describe(result)}: return {{'logits': ..., 'name': ...}}, from call= where the network "
      "cannot be edited"
    )
  outputs = {name: value for name, value in outputs.items() if value is not None}
  for name, value in outputs.items():
    if not isinstance(name, str):
      raise ValueError(
        f"outputs: expected arrays by name, got {_describe(value)} as {name!r}: give it a "
        "string as name"
      )
    if not _holds_arrays(value):
      raise ValueError(
        f"outputs: expected arrays by name, got {_describe(value)} as {name!r}: leave it out of "
        "what the network returns"
      )
  if "logits" in outputs and getattr(outputs["logits"], "ndim", 0) == 0:
    raise ValueError(
      "outputs: expected one array of logits with rows first, got "
      f"{_describe(outputs['logits'])}: return a row for each example"
    )
  return outputs


def _holds_arrays(value: Any) -> bool:
  # An LM head has numbers next to its arrays.
  leaves = jax.tree.leaves(value)
  return bool(leaves) and not any(isinstance(leaf, (str, bytes)) for leaf in leaves)


def _describe(value: Any) -> str:
  name = type(value).__name__
  return f"a {name} of {len(value)}" if isinstance(value, (tuple, list)) else name


def primary_outputs(outputs: Mapping[str, Any]) -> Any:
  """Returns what a served model is used for: its logits, or all outputs without logits."""
  return outputs.get("logits", outputs)


def named_calls(tree: Mapping) -> dict[str, Any]:
  """Returns captured outputs as `{'layers/3': output}`; n calls of one submodule are 'path:0' to
  'path:n-1'."""
  named: dict[str, Any] = {}
  for path, calls in _walk(tree, ()):
    for i, output in enumerate(calls):
      named[path if len(calls) == 1 else f"{path}:{i}"] = output
  return named


def _walk(tree: Mapping, path: tuple[str, ...]) -> Iterator[tuple[str, Sequence[Any]]]:
  for name, value in tree.items():
    if name == "__call__":
      yield "/".join(path), value
    elif isinstance(value, Mapping):
      yield from _walk(value, (*path, str(name)))


def as_mapping(features: Features) -> dict[str, str]:
  """Returns `{output name: path}` of features given as a mapping, or as a list of paths.

  Raises:
    ValueError: a text, which is a sequence of letters.
  """
  if isinstance(features, str):
    raise ValueError(
      f"features: expected {{name: path}} or a list of paths, got {features!r}: write "
      f"features={{{features!r}: {features!r}}}"
    )
  return dict(features) if isinstance(features, Mapping) else {path: path for path in features}


def merge_features(outputs: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the outputs of a network and its captured features.

  Raises:
    ValueError: a feature has the name of an output, which it would replace.
  """
  for name in features:
    if name in outputs:
      raise ValueError(
        f"features: expected names that are not among the outputs {sorted(outputs)}, got {name!r}: "
        f"give it another name, such as {{'{name}_feature': path}}"
      )
  return {**outputs, **features}


def pick_features(
  captured: Mapping[str, Any], features: Features, paths: Iterable[str] = ()
) -> dict[str, Any]:
  """Returns the captured outputs that `features` names.

  Args:
    captured: `{path: output}` of the calls that were captured.
    features: `{output name: path}`, or a list of paths.
    paths: further paths that exist, for the hint of an error.

  Raises:
    ValueError: a path that is not among the captured ones.
  """
  outputs = {}
  for name, path in as_mapping(features).items():
    if path not in captured:
      hint = suggest(path, {*captured, *paths} - {path})
      raise ValueError(f"features: expected a submodule's path for {name!r}, got {path!r}{hint}")
    outputs[name] = captured[path]
  return outputs
