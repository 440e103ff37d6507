"""Turns Flax NNX modules into Models."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import compat
from distill_jax.models.adapters.outputs import (
  Features,
  as_outputs,
  named_calls,
  pick_features,
  select_inputs,
)
from distill_jax.types import Batch, Model, Outputs, Variables


def from_nnx(
  module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
  *,
  inputs: str | Sequence[str] = "image",
  features: Features = (),
  call: Callable[..., Any] | None = None,
) -> Model:
  """Returns a Model of a Flax NNX module.

  Args:
    module: a module with its weights (they are copied: training never touches yours), or a function
      `(nnx.Rngs) -> module`, which builds a new one from the key of `init`.
    inputs: the batch entry, or entries, to pass to the module in order.
    features: outputs of submodules to capture without editing the module, `{name: path}` or a list
      of paths such as 'layers/3' ('layers/3:0' for the first call of a submodule that runs several
      times).
    call: `(module, *inputs, train=bool) -> outputs`, for a module that is not simply called, or
      whose mode is its own argument; None: `module(*inputs)`. Dropout and batch norm are switched
      for you in any case.

  Returns:
    A Model. Its params are the module's `nnx.Param`s, its state everything else but random streams;
    in training each random stream gets a new seed from the key of the call.

  Raises:
    ValueError: a function that returns no module; in apply, no key for a module with random streams
      in training, a batch without an input, outputs of another kind, or a path that no submodule
      has.
  """
  has_weights = isinstance(module, nnx.Module)
  if isinstance(module, nnx.Module):
    template = _without_intermediates(module)
  else:
    template = nnx.eval_shape(lambda: _construct(module, jax.random.key(0)))
  graphs = {train: nnx.graphdef(_in_mode(template, train)) for train in (True, False)}
  _, params, streams, state = _split(template)
  variables = Variables(*jax.tree.map(jnp.copy, (params, state))) if has_weights else None

  def init(key: jax.Array, batch: Batch) -> Variables:
    del batch
    if variables is not None:
      return Variables(*jax.tree.map(jnp.copy, (variables.params, variables.state)))
    _, new_params, _, new_state = _split(_construct(module, key))
    return Variables(new_params, new_state)

  def apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    if train and key is None and jax.tree.leaves(streams):
      raise ValueError("key: expected a PRNG key for the module's random streams, got None")
    net = nnx.merge(graphs[train], params, _seed(streams, key), state, copy=True)

    def forward(net, *args):
      return net(*args) if call is None else call(net, *args, train=train)

    result, captured = _run(forward, net, select_inputs(batch, inputs), capture=bool(features))
    new_state = nnx.state(net, nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate)))
    return as_outputs(result) | pick_features(captured, features), nnx.to_pure_dict(new_state)

  return Model(init, apply, variables)


def _construct(make, key: jax.Array) -> nnx.Module:
  module = make(nnx.Rngs(key))
  if not isinstance(module, nnx.Module):
    raise ValueError(
      "module: expected an nnx.Module or a function (nnx.Rngs) -> nnx.Module, got "
      f"{type(module).__name__}"
    )
  return module


def _run(forward, net: nnx.Module, args, *, capture: bool) -> tuple[Any, dict[str, Any]]:
  """Returns what the network returns, and the outputs of its submodules by path."""
  if not capture:
    return forward(net, *args), {}
  result, calls = compat.capture_calls(forward, net, *args)
  return result, named_calls(calls)


def _without_intermediates(module: nnx.Module) -> nnx.Module:
  """Returns the module without values that an earlier call of it left: they are no part of its
  state."""
  bare = compat.view(module)
  nnx.pop(bare, nnx.Intermediate)
  return bare


def _in_mode(module: nnx.Module, train: bool) -> nnx.Module:
  return compat.view(module, deterministic=not train, use_running_average=not train)


def _split(module: nnx.Module) -> tuple[Any, Any, Any, Any]:
  """Returns the graph, the params, the random streams and all other state."""
  graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
  params, streams, state = map(nnx.to_pure_dict, states)
  return graph, params, streams, state


def _seed(streams: Any, key: jax.Array | None) -> Any:
  """Returns the streams with a key of its own for each: equal keys would give two dropout layers
  one mask."""
  key = jax.random.key(0) if key is None else key
  leaves, structure = jax.tree.flatten(streams)
  seeded = []
  for i, leaf in enumerate(leaves):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      stream_key = jax.random.fold_in(key, i)
      seeded.append(jax.random.split(stream_key, leaf.shape) if leaf.shape else stream_key)
    else:
      seeded.append(jnp.zeros(leaf.shape, leaf.dtype))
  return jax.tree.unflatten(structure, seeded)
