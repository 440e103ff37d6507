"""Describes what changes a run's results: functions with their hyper-parameters, and the runtime.

A function is described by its name and by the values that it closes over, so that a description
needs no cooperation: `objectives.logits(losses.kl_divergence, temperature=2.0)` has an entry
`temperature: 2.0`.
"""

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_MAX_VALUES = 5000
_MAX_TEXT = 100
# Their versions tell what their code computes.
_VERSIONED = ("distill_jax", "jax", "jaxlib", "optax", "flax", "keras", "equinox", "functools")
_FLAGS = (
  "jax_enable_x64",
  "jax_threefry_partitionable",
  "jax_default_prng_impl",
  "jax_default_matmul_precision",
  "jax_numpy_dtype_promotion",
)


def describe(**values: Any) -> dict[str, str]:
  """Returns `{path: text}` of the numbers, texts, arrays and functions in nested values.

  Functions, partial functions, dataclasses, named tuples and containers are opened; of any other
  object only the type is named. A path repeats the names of the arguments and keys on the way.

  >>> "<lambda>" in describe(rate=lambda step: 0.1)["rate"]
  True
  """
  found: dict[str, list[str]] = {}
  waiting: list[tuple[str, Any, tuple[int, ...]]] = []
  waiting += [(name, value, ()) for name, value in reversed(values.items())]
  for _ in range(_MAX_VALUES):
    if not waiting:
      break
    path, value, parents = waiting.pop()
    text = _text(value)
    if text is not None:
      found.setdefault(path, []).append(text)
    if id(value) not in parents:
      parents = (*parents, id(value))
      items = [(f"{path}.{name}" if name else path, item, parents) for name, item in _items(value)]
      waiting += reversed(items)
  return {path: _shorten(", ".join(texts)) for path, texts in found.items()}


def runtime() -> dict[str, str]:
  """Returns versions and flags of jax that change random numbers or arithmetic."""
  flags = {name.removeprefix("jax_"): str(getattr(jax.config, name)) for name in _FLAGS}
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
  return versions | flags | {"device": jax.devices()[0].device_kind}


def transformations(optimizer: Any) -> str:
  """Returns the names of the innermost update functions of an optax optimizer, in order.

  >>> import optax
  >>> transformations(optax.adamw(1e-3))
  'scale_by_adam, add_decayed_weights, scale'
  """
  return ", ".join(_update_names(optimizer.update, set()))


def _update_names(value: Any, seen: set[int]) -> list[str]:
  if id(value) in seen:
    return []
  seen.add(id(value))
  if isinstance(value, tuple | list):
    return [name for item in value for name in _update_names(item, seen)]
  if not isinstance(value, types.FunctionType):
    return []
  inner = [name for item in _closure(value).values() for name in _update_names(item, seen)]
  is_update = value.__code__.co_varnames[1:2] == ("state",)
  return inner or ([_name(value)] if is_update else [])


def _text(value: Any) -> str | None:
  """Returns the text of what is not opened, and the name of a function; None: of a container."""
  if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum):
    return repr(value)
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    return _array_text(value)
  if isinstance(value, types.FunctionType):
    return _name(value) + _code_digest(value)
  if isinstance(value, Mapping | list | tuple | functools.partial | types.MethodType):
    return None
  if hasattr(value, "__wrapped__") or dataclasses.is_dataclass(value):
    return None
  return getattr(value, "__qualname__", None) or type(value).__qualname__


def _items(value: Any) -> list[tuple[str, Any]]:
  """Returns what a value is opened to; '' stands for a value that adds no name to the path."""
  if isinstance(value, types.FunctionType):
    return [*_closure(value).items(), *_defaults(value).items()]
  if isinstance(value, functools.partial):
    return [("", value.func), ("", value.args), *value.keywords.items()]
  if isinstance(value, types.MethodType):
    return [("", value.__func__), ("", value.__self__)]
  if isinstance(value, Mapping):
    return [(str(key), item) for key, item in value.items()]
  if isinstance(value, tuple) and hasattr(value, "_fields"):
    # How something begins does not matter to a run that resumes.
    return [("", getattr(value, name)) for name in value._fields if name != "init"]
  if isinstance(value, list | tuple):
    return [("", item) for item in value]
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
  wrapped = getattr(value, "__wrapped__", None)
  return [] if wrapped is None else [("", wrapped)]


def _closure(function: types.FunctionType) -> dict[str, Any]:
  values = {}
  for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
    try:
      values[name] = cell.cell_contents
    except ValueError:  # It is assigned later.
      continue
  return values


def _defaults(function: types.FunctionType) -> dict[str, Any]:
  """Returns the values of arguments that are not given; none for a versioned package."""
  if _is_versioned(function):
    return {}
  parameters = inspect.signature(function).parameters.values()
  return {p.name: p.default for p in parameters if p.default is not p.empty}


def _is_versioned(function: types.FunctionType) -> bool:
  return (function.__module__ or "").partition(".")[0] in _VERSIONED


def _name(function: types.FunctionType) -> str:
  return function.__qualname__.split(".<locals>")[0].rpartition(".")[2]


def _code_digest(function: types.FunctionType) -> str:
  """Returns ' ' and a digest of a function's constants and names; '' for a versioned package."""
  if _is_versioned(function):
    return ""
  code = function.__code__
  constants = [
    # The order of a set differs from process to process.
    sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
    for constant in code.co_consts
    if not inspect.iscode(constant) and constant != function.__doc__
  ]
  return " " + _digest(repr((constants, code.co_names)))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _shorten(text: str) -> str:
  return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... {_digest(text)}"


def _array_text(value: Any) -> str:
  text = f"{value.dtype}{list(value.shape)}"
  if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
    return text
  if not getattr(value, "is_fully_addressable", True) or value.size > 2**20:
    return text
  if value.ndim == 0:
    return repr(value.item())
  return f"{text} {hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:8]}"
