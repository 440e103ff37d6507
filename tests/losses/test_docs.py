"""The examples in the docstrings run."""

import doctest
import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import pytest

import distill_jax.losses.__main__ as loss_table
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
      return f(
        *(next(rest) if is_traced else arg for arg, is_traced in zip(args, traced)), **kwargs
      )

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


def test_readme_is_what_the_docstrings_say():
  page = loss_table.table()
  assert loss_table.README.read_text() == page, "stale: run `python -m distill_jax.losses`"
  assert all(f"`{name}`" in page for name in losses.__all__)


def test_a_docstring_without_a_field_is_found():
  def f():
    """Nothing.

    Compares: a
      and b
    """

  with pytest.raises(ValueError, match="f has no line 'Shapes: ...'"):
    loss_table.fields(f)


def test_every_loss_documents_its_arguments():
  for name in losses.__all__:
    doc = getattr(losses, name).__doc__
    if "Compares:" in doc:
      parameters = inspect.signature(getattr(losses, name)).parameters
      missing = [p for p in parameters if f"\n    {p}: " not in doc]
      assert not missing, f"{name} does not document {missing}"
      assert "Returns:" in doc and "Raises:" in doc, name
      kinds = [
        p.kind
        for p in parameters.values()
        if p.default is not inspect.Parameter.empty and p.name != "mask"
      ]
      assert set(kinds) <= {inspect.Parameter.KEYWORD_ONLY}, (
        f"{name} takes a hyper-parameter by position"
      )
