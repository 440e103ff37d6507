"""The examples in the docstrings run."""

import doctest
import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

from distill_jax import losses

MODULES = [m.name for m in pkgutil.iter_modules(losses.__path__) if not m.name.startswith("_")]


def compiled(f):
  """`f` under jit, in one piece: op by op each example compiles dozens of programs."""

  @functools.wraps(f)
  def call(*args, **kwargs):
    traced = [all(isinstance(x, jax.Array) for x in jax.tree.leaves(arg)) for arg in args]
    arrays = [arg for arg, is_traced in zip(args, traced) if is_traced]

    def run(arrays):
      rest = iter(arrays)
      return f(*(next(rest) if is_traced else arg for arg, is_traced in zip(args, traced)), **kwargs)

    return jax.jit(run)(arrays)

  return call


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
  module = importlib.import_module(f"distill_jax.losses.{name}")
  public = {f: getattr(losses, f) for f in losses.__all__ if callable(getattr(losses, f))}
  own = [f for f in public.values() if f.__module__ == module.__name__ and not isinstance(f, type)]
  known = {**vars(module), "jax": jax, "jnp": jnp}
  known |= {name: compiled(f) for name, f in public.items() if not isinstance(f, type)}
  finder = doctest.DocTestFinder(recurse=False)
  runner = doctest.DocTestRunner()
  for f in own:
    examples = [test for test in finder.find(f, f.__name__, globs=known) if test.examples]
    assert examples, f"{f.__name__} has no example"
    for test in examples:
      runner.run(test)
  assert runner.failures == 0
