"""Docstrings of the losses: examples, fields of the table, arguments."""

import doctest
import importlib
import inspect
import pkgutil

import compiled_losses
import jax
import jax.numpy as jnp
import pytest
from compiled_losses import quick_compilation

import distill_jax.losses.__main__ as loss_table
from distill_jax import losses

MODULES = [m.name for m in pkgutil.iter_modules(losses.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
  module = importlib.import_module(f"distill_jax.losses.{name}")
  public = [getattr(losses, name) for name in losses.__all__]
  functions = [f for f in public if f.__module__ == module.__name__]
  names = {**vars(module), "jax": jax, "jnp": jnp, **vars(compiled_losses.losses)}
  finder = doctest.DocTestFinder(recurse=False)
  runner = doctest.DocTestRunner()
  for f in functions:
    examples = [test for test in finder.find(f, f.__name__, globs=names) if test.examples]
    assert examples, f"{f.__name__} has no example"
    with quick_compilation():
      for test in examples:
        runner.run(test)
  assert runner.failures == 0


def test_readme_is_up_to_date():
  page = loss_table.table()
  assert loss_table.README.read_text() == page, "stale: run `python -m distill_jax.losses`"
  assert all(f"`{name}`" in page for name in losses.__all__)


def test_docstring_without_a_field_raises():
  def f():
    """Nothing.

    Compares: a
      and b
    """

  with pytest.raises(ValueError, match="^f: .*Shapes"):
    loss_table.fields(f)


def test_every_loss_documents_its_arguments():
  for name in losses.__all__:
    doc = inspect.getdoc(getattr(losses, name))  # Python 3.13 removes the indentation.
    if "Compares:" in doc:
      parameters = inspect.signature(getattr(losses, name)).parameters
      missing = [p for p in parameters if f"\n  {p}: " not in doc]
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
