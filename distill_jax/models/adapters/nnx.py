"""Turns Flax NNX modules into Models."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import compat
from distill_jax.models.adapters.kinds import adapter_of, wrong_kind
from distill_jax.models.adapters.modes import mode, mode_arguments
from distill_jax.models.adapters.outputs import (
  Features,
  as_mapping,
  as_outputs,
  merge_features,
  named_calls,
  pick_features,
  select_inputs,
)
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Outputs, Tree, Variables

_KIND = "an nnx.Module or a function (nnx.Rngs) -> nnx.Module"


def from_nnx(
  module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
  *,
  inputs: str | Sequence[str] = "image",
  features: Features = (),
  call: Callable[..., Any] | None = None,
  trainable: Any = nnx.Param,
) -> Model:
  """Returns a Model of a Flax NNX module.

  Layers that their owner put in evaluation mode (`use_running_average=True`,
  `deterministic=True`, or `.eval()` for all) stay in it in training: call `.train()` before
  to train all of them. `optax.set_to_zero` in `optax.multi_transform` freezes parameters only
  (`optax.masked` does not: it passes the gradient on), and `fit` warns of batch norms whose
  statistics still move: they stay with `use_running_average=True`, or where `trainable`
  leaves their parameters out.

  Args:
    module: a module with its weights (they are copied: training never touches yours), or a function
      `(nnx.Rngs) -> module`, which builds a new one from the key of `init`.
    inputs: the batch entry, or entries, to pass to the module in order.
    features: outputs of submodules to capture without editing the module, `{name: path}` or a list
      of paths such as 'layers/3' ('layers/3:0' for the first call of a submodule that runs several
      times).
    call: `(module, *inputs, train=bool) -> outputs`, for a module that is not simply called; None:
      `module(*inputs)`. Dropout and batch norm are switched for you in any case, and without
      `call` also an argument of its `__call__` named `train`, `training`, `is_training`,
      `deterministic` or `use_running_average` whose default is not None.
    trainable: NNX filter of the variables to train; of a LoRA student `nnx.LoRAParam`. A layer with
      statistics and none of these variables stays in evaluation mode.

  Returns:
    A Model. Its params are the module's `trainable` variables, its state everything else but random
    streams; in training each random stream gets a new seed from the key of the call.

  Raises:
    ValueError: neither a module nor a function that returns one; in apply, no key for a module with
      random streams in training, a batch without an input, outputs of another kind, a path that no
      submodule has, or a call that adds variables.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from distill_jax.models import from_nnx
  >>> model = from_nnx(lambda rngs: nnx.Linear(4, 10, rngs=rngs))
  >>> batch = {"image": jnp.ones((2, 4))}
  >>> variables = model.init(jax.random.key(0), batch)
  >>> outputs, state = model.apply(*variables, batch, train=False, key=None)
  >>> outputs["logits"].shape
  (2, 10)
  """
  features = as_mapping(features)
  has_weights = isinstance(module, nnx.Module)
  if not has_weights and not _is_constructor(module):
    raise wrong_kind("module", _KIND, module)
  if isinstance(module, nnx.Module):
    template = _without_intermediates(module)
  else:
    template = nnx.eval_shape(lambda: _construct(module, jax.random.key(0)))
  graphs = {train: nnx.graphdef(_in_mode(template, train, trainable)) for train in (True, False)}
  _, params, streams, state = _split(template, trainable)
  flags = _mode_arguments(type(template)) if call is None else set()
  variables = Variables(*jax.tree.map(jnp.copy, (params, state))) if has_weights else None

  def init(key: jax.Array, batch: Batch) -> Variables:
    del batch
    if variables is not None:
      return Variables(*jax.tree.map(jnp.copy, (variables.params, variables.state)))
    _, new_params, _, new_state = _split(_construct(module, key), trainable)
    return Variables(new_params, new_state)

  def apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    if train and key is None and jax.tree.leaves(streams):
      raise ValueError("key: expected a PRNG key for the module's random streams, got None")
    net = nnx.merge(graphs[train], params, _seed(streams, key), state, copy=True)

    def forward(net, *args):
      return net(*args, **mode(flags, train)) if call is None else call(net, *args, train=train)

    result, captured = _run(forward, net, select_inputs(batch, inputs), capture=bool(features))
    new_state = nnx.to_pure_dict(
      nnx.state(net, nnx.Not(nnx.Any(trainable, nnx.RngState, nnx.Intermediate)))
    )
    _check_state(state, new_state)
    return merge_features(as_outputs(result), pick_features(captured, features)), new_state

  return Model(init, apply, variables)


def _mode_arguments(kind: type) -> set[str]:
  """Returns the arguments of its `__call__` that set the mode, but those of None: a layer's own."""
  function: Any = kind.__call__
  parameters = inspect.signature(function).parameters
  return {name for name in mode_arguments(function) if parameters[name].default is not None}


def _is_constructor(make: Any) -> bool:
  """Returns whether it may be a function `(nnx.Rngs) -> nnx.Module`."""
  if not callable(make) or adapter_of(make) not in (None, "from_nnx"):
    return False
  # The signature of the class itself is that of its metaclass.
  function: Any = make
  if isinstance(make, type):
    function = functools.partial(inspect.getattr_static(make, "__init__"), None)
  try:
    inspect.signature(function).bind(None)
  except TypeError:
    return False
  return True


def _construct(make, key: jax.Array) -> nnx.Module:
  try:
    module = make(nnx.Rngs(key))
  except ValueError as error:
    if "mesh context" not in str(error):
      raise
    raise ValueError(
      "module: expected a mesh of Auto axes for parameters with partition metadata, got none: call "
      "from_nnx, init and fit under jax.set_mesh(sharding.make_mesh(...)), or build the module "
      f"under nnx.use_eager_sharding(False) ({error})"
    ) from error
  if not isinstance(module, nnx.Module):
    raise wrong_kind("module", _KIND, module)
  return module


def _run(forward, net: nnx.Module, args, *, capture: bool) -> tuple[Any, dict[str, Any]]:
  """Returns what the network returns, and the outputs of its submodules by path."""
  if not capture:
    return forward(net, *args), {}
  try:
    result, calls = compat.capture_calls(forward, net, *args)
  except TypeError as error:
    if "scan" not in str(error):
      raise
    raise ValueError(
      "features: expected a module without nnx.scan or nnx.RNN, whose submodules cannot be "
      "captured by path: let its __call__ return (logits, {'name': feature})"
    ) from error
  return result, named_calls(calls)


def _without_intermediates(module: nnx.Module) -> nnx.Module:
  """Returns the module without values that an earlier call of it left: they are no part of its
  state."""
  bare = _copy_graph(module)
  nnx.pop(bare, nnx.Intermediate)
  return bare


def _copy_graph(module: nnx.Module) -> nnx.Module:
  """Returns a module of the same arrays whose attributes can be set."""
  return nnx.merge(*nnx.split(module))


def _in_mode(module: nnx.Module, train: bool, trainable: Any) -> nnx.Module:
  """Returns a copy in training or evaluation mode; what is in evaluation mode stays in it."""
  module = _copy_graph(module)
  for flag in ("deterministic", "use_running_average"):
    # Not hasattr: an nnx.Rngs returns a stream for every attribute.
    def has_mode(path, layer, flag=flag):
      return flag in vars(layer) and not (train and vars(layer)[flag] is True)

    module.set_attributes(has_mode, **{flag: not train}, raise_if_not_found=False)
  if train and trainable is not nnx.Param:
    is_fixed = functools.partial(_has_fixed_statistics, nnx.filterlib.to_predicate(trainable))
    module.set_attributes(is_fixed, use_running_average=True, raise_if_not_found=False)
  return module


def _has_fixed_statistics(is_trainable, path, layer) -> bool:
  variables = [(*path, n, v) for n, v in vars(layer).items() if isinstance(v, nnx.Variable)]
  has_statistics = any(isinstance(variable, nnx.BatchStat) for *_, variable in variables)
  return has_statistics and not any(is_trainable(tuple(p), v) for *p, v in variables)


def _check_state(old: Tree, new: Tree) -> None:
  """Checks that a call added no variables: no step can carry a state that grows."""
  added = {name for name, _ in named_leaves(new)} - {name for name, _ in named_leaves(old)}
  if added:
    raise ValueError(
      f"module: expected calls that keep the module's variables, got new ones, {sorted(added)}: "
      "return such values as outputs, or sow them as nnx.Intermediate"
    )


def _split(module: nnx.Module, trainable: Any) -> tuple[Any, Any, Any, Any]:
  """Returns the graph, the params, the random streams and all other state."""
  graph, *states = nnx.split(module, trainable, nnx.RngState, ...)
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
