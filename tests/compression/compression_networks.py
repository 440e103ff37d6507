"""Variables with random values, which need no compilation of the initialization."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def random_variables(model, rng):
  """Returns variables in which no value is that of a fresh network; variances are positive."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), {})

  def random_leaf(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    values = rng.normal(size=leaf.shape) * 0.3 + (name in ("scale", "var"))
    return jnp.asarray(np.abs(values) if name == "var" else values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(random_leaf, shapes)


def output_fn(model, name, batch):
  """Returns a jitted function `variables -> output` that compiles once for each shape."""
  run = jax.jit(lambda v, batch: model.apply(*v, batch, train=False, key=None)[0][name])
  return lambda variables: run(variables, batch)


def shard_last_axis(tree, mesh):
  """Returns the tree on the mesh, sharded by the last axis where the 8 devices divide it."""

  def sharding(w):
    axis = "data" if w.shape[-1] % 8 == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (w.ndim - 1), axis))

  return jax.device_put(tree, jax.tree.map(sharding, tree))


def assert_trees_close(actual, expected, **tolerances):
  """Compares all leaves, and where they are zero."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, **tolerances)
    np.testing.assert_array_equal(np.asarray(a) == 0, np.asarray(b) == 0)
