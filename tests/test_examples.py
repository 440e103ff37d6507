"""Runs the examples in the docstrings of all public names and modules, except those of the losses.

`tests/losses/test_docs.py` runs those of the losses, one compilation for many.
"""

import doctest
import importlib
import inspect
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax

ROOT = pathlib.Path(distill_jax.__file__).parent
# A class may name the function whose example shows it.
REFERENCE = re.compile(r"^Example in `(\w+)`\.$", re.MULTILINE)


def modules_with_examples():
  """Returns the names of the modules that have an example, without the losses."""
  files = [path for path in ROOT.rglob("*.py") if ">>> " in path.read_text()]
  names = [path.relative_to(ROOT.parent).with_suffix("").parts for path in sorted(files)]
  names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]
  return [name for name in names if name.split(".")[1] not in ("docs", "losses")]


def packages_with_public_names():
  files = [path for path in sorted(ROOT.rglob("__init__.py")) if "__all__ = " in path.read_text()]
  names = [".".join(path.parent.relative_to(ROOT.parent).parts) for path in files]
  return [name for name in names if "._" not in name]


def public_names(module):
  """Returns a module's public functions and classes by name."""
  names = {*getattr(module, "__all__", ()), *getattr(module, "_LAZY", ())}
  values = {name: getattr(module, name) for name in sorted(names)}
  return {name: value for name, value in values.items() if callable(value)}


def has_example(value):
  return ">>> " in (inspect.getdoc(value) or "")


def classes_in(hint):
  """Returns the classes in a type hint, and those in the fields of this package's classes."""
  classes, rest = set(), [hint]
  while rest:
    hint = rest.pop()
    rest += typing.get_args(hint)
    if inspect.isclass(hint) and hint.__module__.startswith("distill_jax") and hint not in classes:
      classes.add(hint)
      rest += typing.get_type_hints(hint).values()
  return classes


def is_shown(value, public):
  """Returns whether the function that a class refers to has an example and shows the class."""
  reference = REFERENCE.search(inspect.getdoc(value) or "")
  function = public.get(reference[1]) if reference else None
  if not has_example(function):
    return False
  returned = classes_in(typing.get_type_hints(function).get("return"))
  return value in returned or f"\n{value.__name__}: " in inspect.getdoc(function)  # raised


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_module(name):
  module = importlib.import_module(name)
  names = {"jax": jax, "jnp": jnp, "np": np} | vars(module)
  result = doctest.testmod(module, globs=names)
  assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", packages_with_public_names())
def test_every_public_name_has_an_example(name):
  public = public_names(importlib.import_module(name))
  shown = {name for name, value in public.items() if has_example(value) or is_shown(value, public)}
  assert public and sorted(public.keys() - shown) == []


def test_reference_to_a_function_that_shows_another_class_is_none():
  class Other:
    """Example in `fit`."""

  public = public_names(distill_jax.train)
  assert is_shown(public["FitResult"], public)
  assert not is_shown(Other, public)
