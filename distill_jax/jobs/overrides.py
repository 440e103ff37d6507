"""Loads a config file, applies `--config.FIELD=VALUE` overrides and checks the result."""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from distill_jax.errors import suggest
from distill_jax.jobs.config import Config, ConfigError, check_config
from distill_jax.jobs.epochs import has_epochs
from distill_jax.jobs.near_names import nearest

_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_UNIONS = (typing.Union, types.UnionType)
_PACKAGE = Path(__file__).parent.parent
_siblings: list[str] = []  # Names of the modules that the last config imported from its folder.


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
  """Returns the config of a file with overrides, checked as a whole.

  A config with epochs is checked when its data are there (`epochs.with_steps`).

  Args:
    path: Python file that defines `get_config()`, or the name of one that distill_jax brings.
    overrides: texts `field=value` or `nested.field=value`. Names may have hyphens for underscores.
      Tuples are `(1,2)` or `1,2`, texts in them with or without quotes. `None` resets an optional
      field. One of a training's `epochs` and `steps` takes the place of the other.

  Raises:
    ConfigError: the file or a field does not exist, or a value has another type than its field or
      is outside its range. The message names the field, the value and the nearest existing name.
  """
  config = _read(config_file(path))
  for override in [*_replaced_lengths(config, overrides), *overrides]:
    config = _override(config, override)
  _check_types(config)
  if not has_epochs(config):
    check_config(config)
  return config


def config_file(name: str) -> Path:
  """Returns the path of a config's file; a name such as 'digits' is one that distill_jax brings."""
  bundled = _bundled_configs().get(name)
  # A shell leaves the ~ of --config=~/job.py as it is.
  path = Path(os.path.expanduser(name))
  return path if bundled is None or path.is_file() else bundled


def _bundled_configs() -> dict[str, Path]:
  """Returns {name: file} of the configs that a wheel has inside of the package."""
  inside, beside = _PACKAGE / "configs", _PACKAGE.parent / "configs"
  folder = inside if inside.is_dir() else beside  # in a checkout
  return {path.stem: path for path in folder.glob("*.py")}


def _read(path: Path) -> Config:
  """Runs a config file and returns what its `get_config` returns, without overrides."""
  if not path.is_file():
    neighbors = [str(file) for file in path.parent.glob("*.py")]
    if not path.suffix:
      neighbors += _bundled_configs()
    hint = suggest(str(path), neighbors) if neighbors else ""
    raise ConfigError(f"--config: there is no file {path}{hint}")
  if path.suffix != ".py":
    raise ConfigError(
      f"--config: expected a Python file (.py) that defines get_config(), got {path}"
    )
  spec: Any = importlib.util.spec_from_file_location(f"__config_{path.stem}__", path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Dataclasses and type hints look their module up there.
  with _imports_from(path.resolve().parent):
    spec.loader.exec_module(module)
  config = module.get_config() if hasattr(module, "get_config") else None
  if not isinstance(config, Config):
    raise ConfigError(
      f"--config: expected {path} to define get_config(), which returns a "
      f"distill_jax.jobs.config.Config, got {type(config).__name__}"
    )
  _check_defaults(config)
  return config


@contextlib.contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
  """Lets a config import the files next to it.

  They stay imported until another config is read, because methods of this one may import them
  later. Then they are forgotten, because another folder may have files of the same names.
  """
  while _siblings:
    sys.modules.pop(_siblings.pop(), None)
  before = set(sys.modules)
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))
    for name in sys.modules.keys() - before:
      file = getattr(sys.modules[name], "__file__", None)
      if file and "." not in name and Path(file).resolve().parent == folder:
        _siblings.append(name)


def _check_defaults(config: Any) -> None:
  """Raises for a class attribute that looks like a field's default, but is none.

  A dataclass silently ignores a value without a type, a value in a subclass without the decorator,
  and the value of a second base where the first base inherits the field.
  """
  for field in dataclasses.fields(config):
    for owner in type(config).__mro__:
      attributes = vars(owner)
      declared = None
      if field.name in inspect.get_annotations(owner):
        declared = attributes.get("__dataclass_fields__", {}).get(field.name)
      if declared is field:
        break
      slot = inspect.isdatadescriptor(attributes.get(field.name))
      if declared is not None or (field.name in attributes and not slot):
        raise ConfigError(
          f"{type(config).__name__}.{field.name}: expected a dataclass field, got a value in "
          f"{owner.__name__} that has no effect: write `{field.name}: TYPE = VALUE` in "
          f"{type(config).__name__}, with @dataclasses.dataclass before the class"
        )
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      _check_defaults(value)


def _override(config: Config, override: str) -> Config:
  """Returns a copy of the config in which one field has another value."""
  name, equals, text = override.partition("=")
  path = name.replace("-", "_")
  if not equals:
    raise ConfigError(f"--config.{name}: expected --config.{name}=VALUE, got no value")
  paths = field_paths(config)
  if path not in paths:
    near = nearest(path, list(paths))
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {list(paths)}"
    raise ConfigError(f"--config.{name}: there is no such field; {hint}")
  return _replace(config, path.split("."), text)


def _replaced_lengths(config: Config, overrides: Sequence[str]) -> list[str]:
  """Returns overrides that reset the steps of a training whose epochs are given, or its epochs."""
  names = [override.partition("=")[0].replace("-", "_") for override in overrides]
  opposites = {"steps": "epochs", "epochs": "steps"}
  others = []
  for name in names:
    training, _, length = name.rpartition(".")
    if training and length in opposites:
      others.append(f"{training}.{opposites[length]}")
  paths = field_paths(config)
  return [f"{other}=0" for other in others if other in paths and other not in names]


def _replace(config: Any, path: Sequence[str], text: str) -> Any:
  """Returns a copy, so that fields that share one default instance do not change together."""
  name, *inner_path = path
  if inner_path:
    value = _replace(getattr(config, name), inner_path, text)
  else:
    value = _convert(text, typing.get_type_hints(type(config))[name])
  config = copy.copy(config)
  object.__setattr__(config, name, value)  # The copy may be of a frozen dataclass.
  return config


def field_paths(config: Any) -> dict[str, Any]:
  """Returns {dotted name: value} of all fields, those of nested dataclasses in place of the
  nested.
  """
  paths: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    inner = field_paths(value) if dataclasses.is_dataclass(value) else {}
    paths |= {f"{field.name}.{name}": x for name, x in inner.items()} or {field.name: value}
  return paths


def _convert(text: str, hint: Any) -> Any:
  """Returns `text` as a value of the type `hint`; as it is where it is none (`_check_types`)."""
  options = typing.get_args(hint)
  if typing.get_origin(hint) in _UNIONS:
    if text == "None" and types.NoneType in options:
      return None
    values = [_convert(text, option) for option in options]
    return next((v for v, option in zip(values, options) if _fits(v, option)), text)
  if typing.get_origin(hint) is Literal:
    return next((option for option in options if str(option) == text), text)
  if typing.get_origin(hint) is tuple:
    return _convert_tuple(text, options)
  try:
    if hint is bool:
      return _BOOLEANS[text.lower()]
    return int(text, 0) if hint is int else float(text) if hint is float else text
  except (KeyError, ValueError):
    return text


def _convert_tuple(text: str, item_types: tuple[Any, ...]) -> tuple[Any, ...]:
  if str in item_types and not any(quote in text for quote in "'\""):
    items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
  else:
    try:
      literal = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      literal = text
    literals = literal if isinstance(literal, (tuple, list)) else (literal,)
    items = [item if isinstance(item, str) else repr(item) for item in literals]
  if item_types[-1] is Ellipsis:
    item_types = item_types[:1] * len(items)
  if len(items) != len(item_types):
    return tuple(items)
  return tuple(map(_convert, items, item_types))


def _check_types(config: Any, prefix: str = "") -> None:
  """Raises for a value, of an override or of a default, that has another type than its field."""
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    name = f"{prefix}{field.name}"
    value = getattr(config, field.name)
    hint = hints[field.name]
    if dataclasses.is_dataclass(value):
      _check_types(value, f"{name}.")
    elif not _fits(value, hint):
      type_name = hint.__name__ if hint in (bool, int, float, str) else hint
      raise ConfigError(f"{name}: expected {type_name}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
  """Returns whether a value has a type; an int is a float as well, and a bool is no int."""
  origin = typing.get_origin(hint)
  options = typing.get_args(hint)
  if hint is Any:
    return True
  if origin is Literal:
    return value in options
  if origin in _UNIONS:
    return any(_fits(value, option) for option in options)
  if origin is tuple and isinstance(value, tuple):
    item_types = options[:1] * len(value) if options[-1] is Ellipsis else options
    return len(value) == len(item_types) and all(map(_fits, value, item_types))
  if isinstance(value, bool):
    return hint is bool
  return isinstance(value, (int, float) if hint is float else origin or hint)
