"""Flax Linen modules as Models."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze

from distill_jax.models.adapters.outputs import (
  Features,
  as_mapping,
  as_outputs,
  named_calls,
  pick_features,
  select_inputs,
)
from distill_jax.types import Batch, Model, Outputs, Variables

_TRAINING_FLAGS = {"train", "training", "is_training"}
_INFERENCE_FLAGS = {"deterministic", "use_running_average"}
_FLAGS = _TRAINING_FLAGS | _INFERENCE_FLAGS


def from_linen(
  module: Any,
  variables: Mapping[str, Any] | None = None,
  *,
  inputs: str | Sequence[str] = "image",
  features: Features = (),
  rngs: Sequence[str] = ("dropout",),
  call: Callable[..., Any] | None = None,
) -> Model:
  """A Flax Linen module as a Model.

  Args:
    module: the module. An argument of its `__call__` named `train`, `training`, `is_training`,
      `deterministic` or `use_running_average` is set by the mode; so is a field of that name that is a bool
      or None, where `__call__` has no such argument.
    variables: trained variables, `{'params': ..., 'batch_stats': ...}`, if there are any.
    inputs: the batch entry, or entries, passed to the module in order.
    features: as in `from_nnx`; paths are module names, 'Conv_0' or 'encoder/layer_3'.
    rngs: names of the random streams that training uses.
    call: `(bound module, *inputs, train=bool) -> outputs` for a module that is used in another way.

  Returns:
    A Model. Its params are the collection 'params', its state all other collections.
  """
  flags = (
    set(inspect.signature(type(module).__call__).parameters) & _FLAGS if call is None else set()
  )
  fields = _mode_fields(module) - flags if call is None else set()
  in_mode = {
    train: module.clone(**_mode(fields, train)) if fields else module for train in (True, False)
  }
  variables = None if variables is None else unfreeze(dict(variables))
  paths = {path.split(":")[0] for path in as_mapping(features).values()}

  def method(bound, *args, train):
    if call is not None:
      return call(bound, *args, train=train)
    return bound(*args, **_mode(flags, train))

  def init(key: jax.Array, batch: Batch) -> Variables:
    if variables is not None:
      return _linen_variables(jax.tree.map(jnp.copy, variables))
    streams = {name: jax.random.fold_in(key, i) for i, name in enumerate(("params", *rngs))}
    made = in_mode[False].init(streams, *select_inputs(batch, inputs), train=False, method=method)
    return _linen_variables(unfreeze(made))

  def apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    mutable = [*(state if train else ()), *(["intermediates"] if paths else [])]
    streams = (
      {} if key is None else {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}
    )
    called = set()

    def capture(submodule, method_name):
      path = "/".join(submodule.path)
      called.update([path] if method_name == "__call__" else [])
      return method_name == "__call__" and path in paths

    result, changed = in_mode[train].apply(
      {"params": params, **state},
      *select_inputs(batch, inputs),
      train=train,
      method=method,
      rngs=streams,
      mutable=mutable,
      capture_intermediates=capture,
    )
    captured = named_calls(changed.get("intermediates", {}))
    new_state = {name: changed.get(name, old) for name, old in state.items()} if train else state
    return as_outputs(result) | pick_features(captured, features, called), new_state

  return Model(init, apply, _linen_variables(variables) if variables is not None else None)


def _mode_fields(module) -> set[str]:
  names = {field.name for field in dataclasses.fields(module)} & _FLAGS
  return {name for name in names if isinstance(getattr(module, name), bool | None)}


def _mode(flags: set[str], train: bool) -> dict[str, bool]:
  return {flag: train if flag in _TRAINING_FLAGS else not train for flag in flags}


def _linen_variables(collections: Mapping[str, Any]) -> Variables:
  if "params" not in collections:
    raise ValueError(f"variables have no collection 'params'; they have {sorted(collections)}")
  kept = {
    name: value for name, value in collections.items() if name != "params" and not _sown(value)
  }
  return Variables(collections["params"], kept)


def _sown(collection: Any) -> bool:
  """What `Module.sow` fills are tuples that grow with every call: nothing to carry from step to step."""
  nodes = jax.tree.leaves(collection, is_leaf=lambda node: isinstance(node, tuple))
  return any(isinstance(node, tuple) for node in nodes)
