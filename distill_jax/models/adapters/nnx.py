"""Flax NNX modules, Flax Linen modules and plain functions as Models.

A network may return an array (the logits), a mapping of named outputs, or `(logits, mapping)`; all three
become `Outputs`. What it does not return can be captured by the path of the submodule that makes it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze

from distill_jax.errors import suggest
from distill_jax.types import Batch, Model, Outputs, Variables

Features = Mapping[str, str] | Sequence[str]
_TRAINING_FLAGS = {"train", "training", "is_training"}
_INFERENCE_FLAGS = {"deterministic", "use_running_average"}
_FLAGS = _TRAINING_FLAGS | _INFERENCE_FLAGS


def from_nnx(
  module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
  *,
  inputs: str | Sequence[str] = "image",
  features: Features = (),
  call: Callable[..., Any] | None = None,
) -> Model:
  """A Flax NNX module as a Model.

  Args:
    module: a module with its weights (copied: training never touches yours), or a function
      `(nnx.Rngs) -> module` that makes a new one from the key given to `init`.
    inputs: the batch entry, or entries, passed to the module in order.
    features: outputs of submodules to capture without editing the module, `{name: path}` or a list of paths,
      a path being like 'layers/3' ('layers/3:0' for the first call of a submodule that runs several times).
    call: `(module, *inputs, train=bool) -> outputs` for a module that is not simply called, or whose mode is
      its own argument. Dropout and batch norm are switched for you in any case.

  Returns:
    A Model. Its params are the module's `nnx.Param`s, its state everything else but random streams; in
    training each random stream is seeded anew from the key of the call.
  """
  made = isinstance(module, nnx.Module)
  concrete = _bare(module) if made else nnx.eval_shape(lambda: _construct(module, jax.random.key(0)))
  graphs = {train: nnx.graphdef(_in_mode(concrete, train)) for train in (True, False)}
  _, params, streams, state = _split(concrete)
  variables = Variables(*jax.tree.map(jnp.copy, (params, state))) if made else None

  def init(key: jax.Array, batch: Batch) -> Variables:
    del batch
    if variables is not None:
      return Variables(*jax.tree.map(jnp.copy, (variables.params, variables.state)))
    _, new_params, _, new_state = _split(_construct(module, key))
    return Variables(new_params, new_state)

  def apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    if train and key is None and jax.tree.leaves(streams):
      raise ValueError("the module draws random numbers (dropout?) in training: key must not be None")
    net = nnx.merge(graphs[train], params, _seed(streams, key), state, copy=True)
    forward = (lambda m, *args: call(m, *args, train=train)) if call else (lambda m, *args: m(*args))
    args = _select(batch, inputs)
    if features:
      result, found = nnx.capture(forward, nnx.Intermediate, method_outputs=nnx.Intermediate)(net, *args)
      captured = _named_calls(nnx.to_pure_dict(found))
    else:
      result, captured = forward(net, *args), {}
    new_state = nnx.state(net, nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate)))
    return _outputs(result) | _pick(captured, features), nnx.to_pure_dict(new_state)

  return Model(init, apply, variables)


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
  flags = set(inspect.signature(type(module).__call__).parameters) & _FLAGS if call is None else set()
  fields = _mode_fields(module) - flags if call is None else set()
  in_mode = {train: module.clone(**_mode(fields, train)) if fields else module for train in (True, False)}
  variables = None if variables is None else unfreeze(dict(variables))
  paths = {path.split(":")[0] for path in _mapping(features).values()}

  def method(bound, *args, train):
    if call is not None:
      return call(bound, *args, train=train)
    return bound(*args, **_mode(flags, train))

  def init(key: jax.Array, batch: Batch) -> Variables:
    if variables is not None:
      return _linen_variables(jax.tree.map(jnp.copy, variables))
    streams = {name: jax.random.fold_in(key, i) for i, name in enumerate(("params", *rngs))}
    made = in_mode[False].init(streams, *_select(batch, inputs), train=False, method=method)
    return _linen_variables(unfreeze(made))

  def apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    mutable = [*(state if train else ()), *(["intermediates"] if paths else [])]
    streams = {} if key is None else {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}
    called = set()

    def capture(submodule, method_name):
      path = "/".join(submodule.path)
      called.update([path] if method_name == "__call__" else [])
      return method_name == "__call__" and path in paths

    result, changed = in_mode[train].apply(
      {"params": params, **state},
      *_select(batch, inputs),
      train=train,
      method=method,
      rngs=streams,
      mutable=mutable,
      capture_intermediates=capture,
    )
    captured = _named_calls(changed.get("intermediates", {}))
    new_state = {name: changed.get(name, old) for name, old in state.items()} if train else state
    return _outputs(result) | _pick(captured, features, called), new_state

  return Model(init, apply, _linen_variables(variables) if variables is not None else None)


def from_apply(
  init: Callable[..., Any] | None,
  apply: Callable[..., Any],
  *,
  variables: Any = None,
  inputs: str | Sequence[str] = "image",
) -> Model:
  """Plain functions as a Model: `apply(params, *inputs) -> outputs`.

  Args:
    init: `(key, *inputs) -> params`, or `-> (params, state)` if `apply` takes `state`. None: there are only
      the given `variables`.
    apply: takes `params` and the inputs; arguments of the names `state`, `train` and `key`, if it has them,
      are passed by keyword. With `state` it returns `(outputs, new state)`.
    variables: trained params, or `(params, state)`.
    inputs: the batch entry, or entries, passed in order.

  >>> model = from_apply(lambda key, x: jnp.zeros((64, 10)), lambda w, x: x.reshape(len(x), -1) @ w)
  """
  accepted = set(inspect.signature(apply).parameters) & {"state", "train", "key"}

  def as_variables(values) -> Variables:
    if "state" not in accepted:
      return Variables(values, {})
    return Variables(*_two(values, "with an argument `state`, init and variables must be (params, state)"))

  def full_init(key: jax.Array, batch: Batch) -> Variables:
    if variables is not None:
      return as_variables(jax.tree.map(jnp.copy, variables))
    if init is None:
      raise ValueError("the model has neither init nor variables: give one of them to from_apply")
    return as_variables(init(key, *_select(batch, inputs)))

  def full_apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    given = {"state": state, "train": train, "key": key}
    result = apply(params, *_select(batch, inputs), **{name: given[name] for name in accepted})
    if "state" in accepted:
      result, state = _two(result, "with an argument `state`, apply must return (outputs, new state)")
    return _outputs(result), state

  return Model(full_init, full_apply, as_variables(variables) if variables is not None else None)


def _construct(make, key) -> nnx.Module:
  module = make(nnx.Rngs(key))
  if not isinstance(module, nnx.Module):
    raise ValueError(
      f"expected an nnx.Module or a function (nnx.Rngs) -> nnx.Module, got {type(module).__name__}"
    )
  return module


def _bare(module):
  """The module without values that an earlier call of it left behind: they are no part of its state."""
  bare = nnx.view(module, only=nnx.Module, raise_if_not_found=False)
  nnx.pop(bare, nnx.Intermediate)
  return bare


def _in_mode(module, train: bool):
  modes = {"deterministic": not train, "use_running_average": not train}
  # An nnx.Rngs takes every attribute for a stream, so view would draw from a stream called 'set_view'.
  return nnx.view(module, only=nnx.Module, raise_if_not_found=False, **modes)


def _split(module):
  graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
  return graph, *map(nnx.to_pure_dict, states)


def _seed(streams, key):
  """A key of its own for every stream: equal keys would give two dropout layers the same mask."""
  key = jax.random.key(0) if key is None else key
  leaves, structure = jax.tree.flatten(streams)
  seeded = []
  for i, leaf in enumerate(leaves):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      own = jax.random.fold_in(key, i)
      seeded.append(jax.random.split(own, leaf.shape) if leaf.shape else own)
    else:
      seeded.append(jnp.zeros(leaf.shape, leaf.dtype))
  return jax.tree.unflatten(structure, seeded)


def _mode_fields(module) -> set[str]:
  names = {field.name for field in dataclasses.fields(module)} & _FLAGS
  return {name for name in names if isinstance(getattr(module, name), bool | None)}


def _mode(flags: set[str], train: bool) -> dict[str, bool]:
  return {flag: train if flag in _TRAINING_FLAGS else not train for flag in flags}


def _linen_variables(collections: Mapping[str, Any]) -> Variables:
  if "params" not in collections:
    raise ValueError(f"variables have no collection 'params'; they have {sorted(collections)}")
  kept = {name: value for name, value in collections.items() if name != "params" and not _sown(value)}
  return Variables(collections["params"], kept)


def _sown(collection: Any) -> bool:
  """What `Module.sow` fills are tuples that grow with every call: nothing to carry from step to step."""
  nodes = jax.tree.leaves(collection, is_leaf=lambda node: isinstance(node, tuple))
  return any(isinstance(node, tuple) for node in nodes)


def _select(batch: Batch, inputs: str | Sequence[str]) -> tuple[jax.Array, ...]:
  names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
  for name in names:
    if name not in batch:
      raise ValueError(f"the batch has no entry {name!r}{suggest(name, batch)}")
  return tuple(batch[name] for name in names)


def _outputs(result: Any) -> dict[str, Any]:
  if isinstance(result, Mapping):
    return dict(result)
  if isinstance(result, (jax.Array, np.ndarray)):
    return {"logits": result}
  if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
    return {"logits": result[0], **result[1]}
  raise ValueError(
    f"a network must return logits, a mapping of outputs, or (logits, mapping); got {type(result).__name__}"
  )


def _named_calls(tree: Mapping) -> dict[str, Any]:
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


def _mapping(features: Features) -> dict[str, str]:
  return dict(features) if isinstance(features, Mapping) else {path: path for path in features}


def _two(values: Any, expected: str) -> tuple[Any, Any]:
  if not isinstance(values, (tuple, list)) or len(values) != 2:
    raise ValueError(f"{expected}, got {type(values).__name__}")
  return values[0], values[1]


def _pick(captured: Mapping[str, Any], features: Features, called=()) -> dict[str, Any]:
  picked = {}
  for name, path in _mapping(features).items():
    if path not in captured:
      raise ValueError(
        f"no submodule output {path!r} to capture as {name!r}{suggest(path, {*captured, *called} - {path})}"
      )
    picked[name] = captured[path]
  return picked
