"""The public losses under jit: op by op each call would compile dozens of programs."""

import contextlib
import functools
import os
import types

import jax
import numpy as np

from distill_jax import losses as public

ARRAY = object()


def compiled(f):
  """Returns `f` under jit; arguments that are no arrays are static."""

  @functools.wraps(f)
  def call(*args, **kwargs):
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
    static = tuple(ARRAY if traced else x for x, traced in zip(leaves, is_array))
    arrays = [x for x, traced in zip(leaves, is_array) if traced]
    return _program(f, structure, static)(arrays)

  return call


@functools.cache
def _program(f, structure, static):
  def run(arrays):
    rest = iter(arrays)
    leaves = [next(rest) if x is ARRAY else x for x in static]
    args, kwargs = jax.tree.unflatten(structure, leaves)
    return f(*args, **kwargs)

  return jax.jit(run)


def _entry(name):
  x = getattr(public, name)
  return x if isinstance(x, type) else compiled(x)


@contextlib.contextmanager
def quick_compilation():
  """Turns most of XLA's optimizations off; not where `.ci/run` compiles as users do."""
  if "DISTILL_JAX_COMPILED_AS_USERS_DO" in os.environ:
    yield
    return
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


losses = types.SimpleNamespace(**{name: _entry(name) for name in public.__all__})
