"""Runs the examples in the docstrings of all public names and modules, except those of the losses.

`tests/losses/test_docs.py` runs those of the losses, one compilation for many.
"""

import doctest
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax

ROOT = pathlib.Path(distill_jax.__file__).parent
# Every function and class of these has an example.
COMPLETE = ("data", "losses", "tasks")


def modules_with_examples():
  """Returns the names of the modules that have an example, without the losses."""
  files = [path for path in ROOT.rglob("*.py") if ">>> " in path.read_text()]
  names = [path.relative_to(ROOT.parent).with_suffix("").parts for path in sorted(files)]
  names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]
  return [name for name in names if name.split(".")[1] not in ("docs", "losses")]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_module(name):
  module = importlib.import_module(name)
  names = {"jax": jax, "jnp": jnp, "np": np} | vars(module)
  result = doctest.testmod(module, globs=names)
  assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("package", COMPLETE)
def test_every_public_name_has_an_example(package):
  module = importlib.import_module(f"distill_jax.{package}")
  public = {name: getattr(module, name) for name in module.__all__}
  states = {"Context", "CrdState", "LayerAttention", "SparseTargets"}  # what losses return
  missing = [
    name
    for name, value in public.items()
    if callable(value) and name not in states and ">>> " not in (inspect.getdoc(value) or "")
  ]
  assert missing == []
