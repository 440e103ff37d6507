"""What changes the results of a run is described by name, without the help of what is described."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, objectives
from distill_jax.storage import run_settings


def changes(old, new):
  """Returns the last names of the paths that differ."""
  a, b = run_settings.describe(x=old), run_settings.describe(x=new)
  return {path.rpartition(".")[2] for path in a | b if a.get(path) != b.get(path)}


def kl(temperature=2.0, weight=1.0):
  term = objectives.logits(losses.kl_divergence, temperature=temperature)
  return objectives.weighted(hard=(1.0, objectives.labels()), soft=(weight, term))


def is_in(values):
  """Returns `x in {0, 8}`, whose set has the order of `values`."""

  def contains(x):
    return x in {0, 8}

  constants = tuple(c if c is None else frozenset(values) for c in contains.__code__.co_consts)
  contains.__code__ = contains.__code__.replace(co_consts=constants)
  return contains


def documented(x):
  """Doubles."""
  return 2 * x


def documented_otherwise(x):
  """Returns two times x."""
  return 2 * x


documented_otherwise.__qualname__ = documented.__qualname__


@pytest.mark.parametrize(
  "old, new, expected",
  [
    (kl(), kl(), set()),
    (kl(), kl(temperature=4.0), {"temperature"}),
    (kl(), kl(weight=0.5), {"soft"}),
    (optax.adam(1e-3), optax.adam(1e-3), set()),
    (optax.adam(1e-3), optax.adam(1e-2), {"step_size"}),
    (optax.adam(1e-3), optax.adam(1e-3, b2=0.95), {"b2"}),
    (optax.cosine_decay_schedule(0.1, 10), optax.cosine_decay_schedule(0.1, 20), {"decay_steps"}),
    (functools.partial(max, 1), functools.partial(max, 2), {"x"}),
    (functools.partial(max, key=1), functools.partial(max, key=2), {"key"}),
    (jax.jit(lambda x: 0.1 * x), jax.jit(lambda x: 0.2 * x), {"x"}),
    (lambda x, rate=0.1: rate, lambda x, rate=0.2: rate, {"rate"}),
    # Equal sets, in two orders as in two processes.
    (is_in([0, 8]), is_in([8, 0]), set()),
    (documented, documented_otherwise, set()),
    ("a" * 1000 + "b", "a" * 1000 + "c", {"x"}),
    (np.arange(3), np.arange(1, 4), {"x"}),
    (jnp.zeros(2), jnp.zeros(2, jnp.bfloat16), {"x"}),
    (object(), object(), set()),
  ],
)
def test_what_differs_is_named(old, new, expected):
  assert changes(old, new) == expected


def test_cycles_end():
  loop = [1]
  loop.append(loop)
  assert run_settings.describe(x=loop) == {"x": "1"}


@pytest.mark.parametrize(
  "optimizer, expected",
  [
    (optax.adam(1e-3), "scale_by_adam, scale"),
    (optax.adamw(1e-3), "scale_by_adam, add_decayed_weights, scale"),
    (optax.adam(optax.constant_schedule(1.0)), "scale_by_adam, scale_by_schedule"),
    (optax.masked(optax.sgd(1.0), {"w": True}), "identity, scale"),
  ],
)
def test_transformations_are_listed(optimizer, expected):
  assert run_settings.transformations(optimizer) == expected


def test_flags_of_random_numbers_are_described():
  before = run_settings.runtime()
  with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
    after = run_settings.runtime()
  assert [name for name in before if before[name] != after[name]] == ["threefry_partitionable"]
