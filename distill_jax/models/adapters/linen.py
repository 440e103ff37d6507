"""Turns Flax Linen modules into Models."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, linen
from flax.core import unfreeze

from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.models.adapters.modes import FLAGS, mode, mode_arguments
from distill_jax.models.adapters.outputs import (
  AUXILIARY_LOSS,
  Features,
  as_mapping,
  as_outputs,
  merge_features,
  named_calls,
  pick_features,
  select_inputs,
)
from distill_jax.types import Batch, Model, Outputs, Variables

LOSSES = "losses"
"""Collection into which Flax modules sow auxiliary losses."""


def from_linen(
  module: linen.Module,
  variables: Mapping[str, Any] | None = None,
  *,
  inputs: str | Sequence[str] = "image",
  features: Features = (),
  rngs: Sequence[str] = ("dropout",),
  call: Callable[..., Any] | None = None,
) -> Model:
  """Returns a Model of a Flax Linen module.

  `optax.set_to_zero` in `optax.multi_transform` freezes parameters only (`optax.masked` does not:
  it passes the gradient on), and `fit` warns of batch norms whose statistics still move. They stay
  where the module, or `call`, calls their layers in evaluation mode:

      student = from_linen(net, call=lambda net, x, train: net.head(net.backbone(x, train=False)))

  Args:
    module: the module. The mode sets an argument of its `__call__` named `train`, `training`,
      `is_training`, `deterministic` or `use_running_average`, and without such an argument a field
      of that name that is a bool or None.
    variables: trained variables, `{'params': ..., 'batch_stats': ...}`; None: `init` creates them.
    inputs: the batch entry, or entries, to pass to the module in order.
    features: as in `from_nnx`; paths are module names, 'Conv_0' or 'encoder/layer_3'.
    rngs: names of the random streams that training uses.
    call: `(bound module, *inputs, train=bool) -> outputs`, for a module that is used in another
      way; None: it is called with its inputs and its mode.

  Returns:
    A Model. Its params are the collection 'params', its state all other collections. What the
    module sows into 'losses' joins the loss in training, as the term 'auxiliary_loss'.

  Raises:
    ValueError: no Linen module, or a bound one; variables without params; in apply, a collection or
      random stream that the module needs and does not get, a batch without an input, outputs of
      another kind, or a path that no submodule has.

  >>> import flax.linen as linen
  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax.models import from_linen
  >>> model, batch = from_linen(linen.Dense(10)), {"image": jnp.ones((2, 4))}
  >>> variables = model.init(jax.random.key(0), batch)
  >>> outputs, state = model.apply(*variables, batch, train=False, key=None)
  >>> outputs["logits"].shape
  (2, 10)
  """
  if not isinstance(module, linen.Module):
    raise wrong_kind("module", "a flax.linen.Module", module)
  if module.scope is not None:
    raise ValueError(
      f"module: expected an unbound module, got {type(module).__name__} bound to variables: write "
      "from_linen(*module.unbind())"
    )
  flags: set[str] = set()
  fields: set[str] = set()
  if call is None:
    flags = mode_arguments(type(module).__call__)
    fields = _mode_fields(module) - flags
  clone: Any = module.clone
  modules = {train: clone(**mode(fields, train)) if fields else module for train in (True, False)}
  variables = None if variables is None else unfreeze(dict(variables))
  paths = {path.split(":")[0] for path in as_mapping(features).values()}

  def method(bound, *args, train):
    if call is not None:
      return call(bound, *args, train=train)
    return bound(*args, **mode(flags, train))

  def init(key: jax.Array, batch: Batch) -> Variables:
    if variables is not None:
      return _linen_variables(jax.tree.map(jnp.copy, variables))
    streams = _streams(key, ("params", *rngs))
    args = select_inputs(batch, inputs)
    with _name_cause(module, rngs, ("params",)):
      collections = modules[False].init(streams, *args, train=False, method=method)
    return _linen_variables(unfreeze(collections))

  def apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    sown_losses = train and LOSSES not in state
    mutable = [*(state if train else ()), *(["intermediates"] if paths else [])]
    mutable += [LOSSES] if sown_losses else []
    streams = {} if key is None else _streams(key, rngs)
    called: set[str] = set()
    args = select_inputs(batch, inputs)
    with _name_cause(module, streams, ("params", *state)):
      result, changed = modules[train].apply(
        {"params": params, **state},
        *args,
        train=train,
        method=method,
        rngs=streams,
        mutable=mutable,
        capture_intermediates=_capture(paths, called),
      )
    captured = named_calls(changed.get("intermediates", {}))
    new_state = {name: changed.get(name, old) for name, old in state.items()} if train else state
    outputs = merge_features(as_outputs(result), pick_features(captured, features, called))
    if sown_losses and LOSSES in changed:
      outputs[AUXILIARY_LOSS] = sum(jnp.sum(x) for x in jax.tree.leaves(changed[LOSSES]))
    return outputs, new_state

  return Model(init, apply, _linen_variables(variables) if variables is not None else None)


def _streams(key: jax.Array, names: Iterable[str]) -> dict[str, jax.Array]:
  return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}


def _capture(paths: Collection[str], called: set[str]) -> Callable[[Any, str], bool]:
  """Returns the filter that captures the outputs of these paths, and notes what was called."""

  def capture(submodule: Any, method_name: str) -> bool:
    if method_name != "__call__":
      return False
    path = "/".join(submodule.path)
    called.add(path)
    return path in paths

  return capture


@contextlib.contextmanager
def _name_cause(module: Any, rngs: Iterable[str], collections: Iterable[str]) -> Iterator[None]:
  """Raises a ValueError that names the argument in place of Flax' errors of missing streams and
  variables.

  Args:
    module: the network.
    rngs: names of the random streams that it gets; none: without a key.
    collections: names of those that it gets.
  """
  kind = type(module).__name__
  try:
    yield
  except errors.InvalidRngError as error:
    stream = re.search(r'PRNG for "(\w+)"', str(error))
    if stream is None or not rngs:
      raise
    names = (*rngs, stream[1])
    raise ValueError(
      f"rngs: expected all random streams of {kind}, got {list(rngs)}: {stream[1]!r} is missing: "
      f"write from_linen(..., rngs={names})"
    ) from error
  except (
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeVariableNotFoundError,
  ) as error:
    reason = str(error).splitlines()[0].split(" (https")[0].rstrip(".")
    raise ValueError(
      f"variables: expected all that the init of {kind} creates, got {sorted(collections)}: "
      f"{reason}: pass what init returned, {{'params': ..., 'batch_stats': ...}}"
    ) from error


def _mode_fields(module: Any) -> set[str]:
  names = {field.name for field in dataclasses.fields(module)} & FLAGS
  return {name for name in names if isinstance(getattr(module, name), bool | None)}


def _linen_variables(collections: Mapping[str, Any]) -> Variables:
  if "params" not in collections:
    raise ValueError(f"variables: expected a collection 'params', got {sorted(collections)}")
  state = {
    name: value for name, value in collections.items() if name != "params" and not _is_sown(value)
  }
  return Variables(collections["params"], state)


def _is_sown(collection: Any) -> bool:
  """Returns whether `Module.sow` fills the collection."""
  # It fills tuples that grow with every call, which no step can carry to the next.
  nodes = jax.tree.leaves(collection, is_leaf=lambda node: isinstance(node, tuple))
  return any(isinstance(node, tuple) for node in nodes)
