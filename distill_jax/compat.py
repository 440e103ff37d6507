"""Gives the oldest supported jax and flax what later ones have.

Each shim names the version from which it can go: the oldest supported one (pyproject.toml).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from flax import nnx  # At run time flax is imported where it is used: the losses need only jax.


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Returns the mapped axes along which an array differs, under `shard_map` with `check_vma`."""
  kind = jax.typeof(x)
  if hasattr(kind, "manual_axis_type"):  # jax 0.10.0
    return kind.manual_axis_type.varying
  return kind.vma


def pcast_varying(tree: Any, axis_names: str | Sequence[str]) -> Any:
  """Marks a tree as different along mapped axes, so that its gradient is not summed over them."""
  if hasattr(jax.lax, "pcast"):  # jax 0.8.2
    return jax.lax.pcast(tree, axis_names, to="varying")
  return jax.lax.pvary(tree, axis_names)  # type: ignore[attr-defined]


def psum(tree: Any, axis_name: str | Sequence[str]) -> Any:
  """Returns `jax.lax.psum`, of trees of which only some leaves have a gradient, too."""
  # jax 0.8.2: before, the transpose of a sum of several arrays needs a gradient of each.
  return jax.tree.map(lambda x: jax.lax.psum(x, axis_name), tree)


def all_gather_invarying(x: jax.Array, axis_name: str) -> jax.Array:
  """Returns the rows of all devices of a mapped axis, marked as the same on each; no gradient."""
  if hasattr(jax.lax, "pcast"):  # jax 0.8.2
    return jax.lax.all_gather(x, axis_name, tiled=True, to="invarying")
  parts = jnp.zeros((jax.lax.axis_size(axis_name), *x.shape), x.dtype)
  parts = parts.at[jax.lax.axis_index(axis_name)].set(x)
  return jax.lax.psum(parts, axis_name).astype(x.dtype).reshape(-1, *x.shape[1:])


def inconclusive_dimension_error() -> type[Exception]:
  """Returns the error of a branch on a symbolic size."""
  if hasattr(jax.errors, "InconclusiveDimensionOperation"):  # jax 0.10.1
    return jax.errors.InconclusiveDimensionOperation
  return jax.core.InconclusiveDimensionOperation  # type: ignore[attr-defined]


def iter_modules(module: "nnx.Module") -> Iterator[tuple[tuple, "nnx.Module"]]:
  """Yields (path, module) of a module and all its submodules."""
  from flax import nnx

  if hasattr(nnx, "iter_modules"):  # flax 0.12.1
    return nnx.iter_modules(module)
  return module.iter_modules()


def capture_calls(forward: Callable, net: "nnx.Module", *args: Any) -> tuple[Any, dict]:
  """Returns `forward(net, *args)`, and the outputs of all submodules.

  The outputs are nested by path: `{'layers': {0: {'__call__': (output of each call, ...)}}}`.
  """
  from flax import nnx

  if hasattr(nnx, "capture"):  # flax 0.12.6
    capturing = nnx.capture(forward, nnx.Intermediate, method_outputs=nnx.Intermediate)
    result, calls = capturing(net, *args)
  else:
    for _, module in list(iter_modules(net)):
      object.__setattr__(module, "__class__", _recording_class(type(module)))
    result = forward(net, *args)
    calls = nnx.pop(net, nnx.Intermediate)
  return result, nnx.to_pure_dict(calls)


@functools.cache
def _recording_class(module_class: type) -> type:
  """Returns the class with a `__call__` that stores its outputs in the module."""
  from flax import nnx

  def call(self, *args, **kwargs):
    output = module_class.__call__(self, *args, **kwargs)
    earlier = vars(self).get("__call__")
    outputs = (*(() if earlier is None else earlier.value), output)
    self.__call__ = nnx.Intermediate(outputs)
    return output

  return type(module_class.__name__, (module_class,), {"__call__": call})
