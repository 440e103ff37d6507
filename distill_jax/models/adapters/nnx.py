"""Flax NNX modules as Models."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
  concrete = (
    _bare(module) if made else nnx.eval_shape(lambda: _construct(module, jax.random.key(0)))
  )
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
      raise ValueError(
        "the module draws random numbers (dropout?) in training: key must not be None"
      )
    net = nnx.merge(graphs[train], params, _seed(streams, key), state, copy=True)
    forward = (
      (lambda m, *args: call(m, *args, train=train)) if call else (lambda m, *args: m(*args))
    )
    args = select_inputs(batch, inputs)
    if features:
      result, found = nnx.capture(forward, nnx.Intermediate, method_outputs=nnx.Intermediate)(
        net, *args
      )
      captured = named_calls(nnx.to_pure_dict(found))
    else:
      result, captured = forward(net, *args), {}
    new_state = nnx.state(net, nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate)))
    return as_outputs(result) | pick_features(captured, features), nnx.to_pure_dict(new_state)

  return Model(init, apply, variables)


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
