"""What a network takes from a batch and what it returns, as named arrays: shared by all adapters.

A network may return an array (the logits), a mapping of named outputs, or `(logits, mapping)`; all three
become `Outputs`. What it does not return can be captured by the path of the submodule that makes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.errors import suggest
from distill_jax.types import Batch

Features = Mapping[str, str] | Sequence[str]


def select_inputs(batch: Batch, inputs: str | Sequence[str]) -> tuple[jax.Array, ...]:
  names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
  for name in names:
    if name not in batch:
      raise ValueError(f"the batch has no entry {name!r}{suggest(name, batch)}")
  return tuple(batch[name] for name in names)


def as_outputs(result: Any) -> dict[str, Any]:
  if isinstance(result, Mapping):
    return dict(result)
  if isinstance(result, (jax.Array, np.ndarray)):
    return {"logits": result}
  if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
    return {"logits": result[0], **result[1]}
  raise ValueError(
    f"a network must return logits, a mapping of outputs, or (logits, mapping); got {type(result).__name__}"
  )


def named_calls(tree: Mapping) -> dict[str, Any]:
  """`{'layers/3': output}`; a submodule that ran n times is 'path:0' ... 'path:n-1'."""
  named: dict[str, Any] = {}
  for path, calls in _walk(tree, ()):
    for i, output in enumerate(calls):
      named[path if len(calls) == 1 else f"{path}:{i}"] = output
  return named


def _walk(tree, path):
  for name, value in tree.items():
    if name == "__call__":
      yield "/".join(path), value
    elif isinstance(value, Mapping):
      yield from _walk(value, (*path, str(name)))


def as_mapping(features: Features) -> dict[str, str]:
  return dict(features) if isinstance(features, Mapping) else {path: path for path in features}


def pick_features(captured: Mapping[str, Any], features: Features, called=()) -> dict[str, Any]:
  picked = {}
  for name, path in as_mapping(features).items():
    if path not in captured:
      raise ValueError(
        f"no submodule output {path!r} to capture as {name!r}{suggest(path, {*captured, *called} - {path})}"
      )
    picked[name] = captured[path]
  return picked
