"""How a config file is read, overridden and checked as a whole."""

import dataclasses
import difflib
import importlib.util
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from distill_jax.jobs.config import Config, ConfigError, error_prefix

_BESIDE: list[str] = []  # modules that the last config imported from its own folder


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
  """The config of a file with overrides, checked as a whole.

  Args:
    path: the file; it defines `get_config()`.
    overrides: `field=value` or `nested.field=value`; tuples as `(1,2)` or `1,2`, texts in them with or without
      quotes.

  Raises:
    ConfigError: no such file, no such field (the nearest is named), a value of another type or outside its range.
  """
  if not Path(path).is_file():
    near = difflib.get_close_matches(
      Path(path).name, [p.name for p in Path(path).parent.glob("*.py")], n=1
    )
    hint = f"; did you mean {Path(path).parent / near[0]}?" if near else ""
    raise ConfigError(f"--config: there is no file {path}{hint}")
  config = _read(path)
  for override in overrides:
    _check_name(config, override.partition("=")[0])
  config = _override(config, [f"--config.{_quoted(config, override)}" for override in overrides])
  _check_types(config, "")
  config.validate()
  for variant in config.variants():
    with error_prefix(f"objective of {variant!r}" if variant else "objective"):
      config.variant_objective(variant)
  return config


def settings_of(config: Any) -> dict[str, Any]:
  """All fields as plain values that json can hold, nested dataclasses as dicts."""
  return _plain(dataclasses.asdict(config))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
  """Lines `field: old -> new` for the fields in which two settings differ."""
  lines = []
  for name in sorted({*old, *new}):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f"{prefix}{name}.")
    elif a != b:
      lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
  return lines


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _read(path: str) -> Config:
  spec: Any = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  # Another folder may have files of these names. They stay until now: functions of the last config may import them.
  while _BESIDE:
    sys.modules.pop(_BESIDE.pop(), None)
  folder, before = Path(path).resolve().parent, dict(sys.modules)
  sys.modules[spec.name] = module  # dataclasses look their module up
  sys.path.insert(0, str(folder))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
    del sys.modules[spec.name]
    if spec.name in before:
      sys.modules[spec.name] = before[spec.name]
    _BESIDE.extend(
      name for name in sys.modules.keys() - before.keys() if _lies_in(folder, sys.modules[name])
    )
  if not hasattr(module, "get_config"):
    raise ConfigError(f"{path} defines no get_config()")
  config = module.get_config()
  if not isinstance(config, Config):
    raise ConfigError(
      f"{path}: get_config() must return a distill_jax.jobs.config.Config, got {type(config).__name__}"
    )
  _check_defaults(config)
  return config


def _lies_in(folder: Path, module: types.ModuleType) -> bool:
  file = getattr(module, "__file__", None)
  return file is not None and "." not in module.__name__ and Path(file).resolve().parent == folder


def _check_defaults(value: Any) -> None:
  """Refuses fields of a dataclass, and of those in it, whose new default Python would leave out without a word."""
  made = type(value)
  for field in dataclasses.fields(made):
    owner = next(c for c in made.__mro__ if _gives(c, field.name))
    why = _why_lost(field, owner)
    if why:
      raise ConfigError(f"{made.__name__}.{field.name}: {owner.__name__} sets it, {why}")
    inner = getattr(value, field.name)
    if dataclasses.is_dataclass(inner):
      _check_defaults(inner)


def _why_lost(field: dataclasses.Field, owner: type) -> str:
  """Why a field of a dataclass is not the one that a class gives; empty if it is."""
  name, fields = field.name, owner.__dict__.get("__dataclass_fields__", {})
  if name not in inspect.get_annotations(owner):
    return f"without its type: write `{name}: TYPE = ...`"
  if name not in fields:
    return "but is no dataclass: put @dataclasses.dataclass before it"
  if field is not fields[name]:
    return (
      "but of several bases a dataclass takes the first one's, even where that one only inherits it: derive from one "
      "config, and share functions"
    )
  return ""


def _gives(owner: type, name: str) -> bool:
  """Whether a class itself gives a default, or a field: slots and properties of the name are neither."""
  value = owner.__dict__.get(name)
  is_field = name in inspect.get_annotations(owner) and name in owner.__dict__.get(
    "__dataclass_fields__", {}
  )
  return is_field or (name in owner.__dict__ and not hasattr(value, "__set__"))


def _override(config: Config, arguments: list[str]) -> Config:
  values, argv = flags.FlagValues(), ["distill-jax", *arguments]
  config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
  try:
    values(argv)
    return values.config
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(str(error).strip().partition("\n")[0] or type(error).__name__) from error


def _quoted(config: Any, override: str) -> str:
  """An override with quotes around the texts of a tuple; without them `a,b` would be one text."""
  name, _, value = override.partition("=")
  *parents, last = name.split(".")
  for parent in parents:
    config = getattr(config, parent)
  hint = typing.get_type_hints(type(config))[last]
  if (
    typing.get_origin(hint) is not tuple
    or str not in typing.get_args(hint)
    or re.search(r"[\'\"]", value)
  ):
    return override
  texts = (text.strip() for text in value.strip("()").split(","))
  return f"{name}={tuple(text for text in texts if text)!r}"


def _check_name(config: Any, dotted: str) -> None:
  known = list(_paths(config, ""))
  if dotted in known:
    return
  same_end = [path for path in known if path.rpartition(".")[2] == dotted.rpartition(".")[2]]
  near = same_end or difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
  hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {known}"
  raise ConfigError(f"--config.{dotted}: there is no such field; {hint}")


def _paths(config: Any, prefix: str) -> Iterator[str]:
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _paths(value, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}"


def _check_types(config: Any, prefix: str) -> None:
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, hint = getattr(config, field.name), hints[field.name]
    if dataclasses.is_dataclass(value):
      _check_types(value, f"{prefix}{field.name}.")
    elif not _fits(value, hint):
      raise ConfigError(f"{prefix}{field.name}: expected {_name(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, option) for option in arguments)
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    if len(arguments) == 2 and arguments[1] is Ellipsis:
      return all(_fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(map(_fits, value, arguments))
  if hint is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, hint)


def _name(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
