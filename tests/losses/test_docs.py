import doctest
import importlib
import pkgutil

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses

MODULES = [m.name for m in pkgutil.iter_modules(losses.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
  module = importlib.import_module(f"distill_jax.losses.{name}")
  known = {**vars(module), "jnp": jnp, "np": np}
  done = doctest.testmod(module, extraglobs=known)
  assert done.failed == 0
  public = [f for f in losses.__all__ if getattr(losses, f).__module__ == module.__name__]
  assert done.attempted >= len(public)
