"""Turns Equinox modules into Models. Needs the package equinox."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.adapters.functions import from_apply
from distill_jax.models.adapters.kinds import adapter_of, check_call, wrong_kind
from distill_jax.types import Model

try:
  import equinox as eqx
except ImportError as error:
  raise ImportError(f"from_equinox needs Equinox: pip install equinox ({error})") from error

_KIND = "an eqx.Module, a pair (module, state), or a function (key) -> either"


def from_equinox(
  module: eqx.Module | tuple[eqx.Module, eqx.nn.State] | Callable[[jax.Array], Any],
  *,
  inputs: str | Sequence[str] = "image",
) -> Model:
  """Returns a Model of an Equinox module, which takes one example at a time.

      student = from_equinox(lambda key: eqx.nn.make_with_state(Net)(key))
      teacher = from_equinox(trained_module)

  The module is mapped over the rows of a batch, under the axis name of its batch norms ('batch'
  without one). It is called as `module(*inputs)`, with the state after the inputs if it has one,
  and with `key=` (one for each row) if its `__call__` has this argument. Layers that their owner
  put in inference mode (`eqx.nn.inference_mode`) stay in it in training.

  Args:
    module: a module with its weights (they are copied: training never touches yours); of one with
      a state (`eqx.nn.BatchNorm`) the pair that `eqx.nn.make_with_state(Net)(...)` returns; or a
      function `(key) -> module` or pair, which builds a new one from the key of `init`.
    inputs: the batch entry, or entries, to pass to the module in order.

  Returns:
    A Model. Its params are the module with its floating arrays; its state is the list of the
    state's arrays.

  Raises:
    ImportError: Equinox is missing (on import of this adapter).
    ValueError: no module; a module with state without its state; batch norms of several axis names.

  >>> import equinox as eqx
  >>> from distill_jax import models
  >>> student = models.from_equinox(lambda key: eqx.nn.Linear(4, 10, key=key), inputs="x")
  >>> batch = {"x": np.ones((2, 4), np.float32)}
  >>> variables = jax.eval_shape(student.init, jax.random.key(0), batch)
  >>> variables.params.weight.shape
  (10, 4)
  """
  has_weights = isinstance(module, (eqx.Module, tuple))
  net, state = _checked(module if has_weights else _construct(module, jax.random.key(0)))
  code = eqx.filter(net, eqx.is_inexact_array, inverse=True)
  structure = jax.tree.structure(state)
  axis_name = _axis_name(net)
  key_argument = inspect.signature(type(net).__call__).parameters.get("key")

  def init(key: jax.Array, *args):
    del args
    return _variables(*_checked(_construct(module, key)))

  def call(params, args: tuple, state: Any, train: bool, key) -> tuple[Any, Any]:
    net = eqx.combine(params, code)
    net = net if train else eqx.nn.inference_mode(net)
    takes_key = key_argument is not None and (
      # Without a key the module's own default counts, which need not be None.
      key is not None or key_argument.default is inspect.Parameter.empty
    )
    keys = jax.random.split(key, args[0].shape[0]) if takes_key and key is not None else None

    def call_one(args, state, key):
      options = {"key": key} if takes_key else {}
      return (net(*args, **options), None) if state is None else net(*args, state, **options)

    rows = jax.vmap(call_one, in_axes=(0, None, 0), out_axes=(0, None), axis_name=axis_name)
    return rows(args, state, keys)

  def apply(params, *args, train, key):
    return call(params, args, None, train, key)[0]

  def apply_with_state(params, *args, state, train, key):
    outputs, state = call(params, args, jax.tree.unflatten(structure, state), train, key)
    return outputs, _leaves(state)

  return from_apply(
    None if has_weights else init,
    apply if state is None else apply_with_state,
    variables=_variables(net, state) if has_weights else None,
    inputs=inputs,
  )


def _construct(make: Any, key: jax.Array) -> Any:
  if not callable(make) or adapter_of(make) not in (None, "from_equinox"):
    raise wrong_kind("module", _KIND, make)
  check_call("module", make, 1, _KIND)
  return make(key)


def _checked(made: Any) -> tuple[eqx.Module, eqx.nn.State | None]:
  """Returns a module and its state, which is None for a module without one."""
  net, state = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
  if not isinstance(net, eqx.Module) or not isinstance(state, eqx.nn.State | None):
    raise wrong_kind("module", _KIND, made)
  has_state = bool(_layers(net, eqx.nn.StateIndex))
  if has_state and state is None:
    raise ValueError(
      f"module: expected a pair (module, state), got a {type(net).__name__} whose layers have a "
      "state (batch norm): pass what eqx.nn.make_with_state(Net)(...) returns"
    )
  return net, state if has_state else None


def _layers(net: eqx.Module, kind: type) -> list[Any]:
  nodes = jax.tree.leaves(net, is_leaf=lambda node: isinstance(node, kind))
  return [node for node in nodes if isinstance(node, kind)]


def _axis_name(net: eqx.Module) -> Any:
  """Returns the axis name of the module's batch norms, under which rows are mapped."""
  names = {layer.axis_name for layer in _layers(net, eqx.nn.BatchNorm)}
  if len(names) > 1:
    raise ValueError(
      f"module: expected batch norms of one axis_name, got {sorted(map(str, names))}"
    )
  return names.pop() if names else "batch"


def _variables(net: eqx.Module, state: eqx.nn.State | None) -> Any:
  """Returns params, or `(params, state)`."""
  params = eqx.filter(net, eqx.is_inexact_array)
  return params if state is None else (params, _leaves(state))


def _leaves(state: eqx.nn.State) -> list[jax.Array]:
  """Returns the state's arrays."""
  # An eqx.nn.State may be used only once, and a step reads the old one again when it skips an
  # update. Of the weakly typed counter of batch norm a checkpoint cannot store the type.
  return [jnp.asarray(leaf, leaf.dtype) for leaf in jax.tree.leaves(state)]
