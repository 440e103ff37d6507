import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.pruning.thresholds import search_thresholds


def tree(rng):
  """Returns kernels with columns of sizes 1, 2, ..., in another order each."""

  def kernel(rows, order):
    return jnp.asarray(
      np.sign(rng.normal(size=(rows, len(order)))) * (1 + np.asarray(order)), jnp.float32
    )

  return {
    "a": {"kernel": kernel(4, [2, 0, 1, 3, 4]), "bias": jnp.ones(5)},
    "b": {"kernel": kernel(2, [1, 0, 2])},
  }


def zero_columns(params, name):
  return int((np.asarray(params[name]["kernel"]) == 0).all(0).sum())


def test_each_layer_is_cut_as_far_as_the_score_allows(rng):
  params, calls = tree(rng), []

  def evaluate(params):
    """1 less 0.01 for each zero column of a, and 0.1 for each of b."""
    calls.append(params)
    return 1 - 0.01 * zero_columns(params, "a") - 0.1 * zero_columns(params, "b")

  cut = search_thresholds(params, evaluate, minimum=0.855)
  # a may use 0.0725: all of its 4 smaller columns; b the rest, 0.145 - 0.04: one column.
  assert (zero_columns(cut.params, "a"), zero_columns(cut.params, "b")) == (4, 1)
  assert cut.thresholds == {"a/kernel": 4.0, "b/kernel": 1.0}
  assert cut.sparsity == {"a/kernel": 0.8, "b/kernel": pytest.approx(1 / 3)}
  np.testing.assert_allclose(cut.score, 0.86)
  np.testing.assert_array_equal(cut.params["a"]["bias"], 1)
  assert len(calls) <= 1 + 3 + 2
  exact = search_thresholds(params, evaluate, minimum=0.98)
  assert (zero_columns(exact.params, "a"), zero_columns(exact.params, "b")) == (1, 0)
  assert exact.thresholds["b/kernel"] == 0 and exact.sparsity["b/kernel"] == 0


@pytest.mark.parametrize("axes, groups", [((-2,), 4), (None, 20), ((), 1)])
def test_axes_number_the_groups(rng, axes, groups):
  kernel = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
  cut = search_thresholds({"kernel": kernel}, lambda params: 1.0, minimum=0.5, axes=axes)
  np.testing.assert_allclose(cut.sparsity["kernel"], 1 - 1 / groups)
  remaining = np.asarray(cut.params["kernel"]) != 0
  assert remaining.sum() == 20 // groups
  if axes == (-2,):
    assert remaining[np.argmax((np.asarray(kernel) ** 2).sum(1))].all()


def test_invalid_arguments_raise(rng):
  with pytest.raises(ValueError, match="^minimum: .*0.85, got 0.9"):
    search_thresholds(tree(rng), lambda params: 0.85, minimum=0.9)
  with pytest.raises(ValueError, match="^minimum:"):
    search_thresholds(tree(rng), lambda params: float("nan"), minimum=0.9)
  with pytest.raises(ValueError, match=r"pattern: "):
    search_thresholds(tree(rng), lambda params: 0.85, minimum=0.5, pattern="conv")
  with pytest.raises(ValueError, match="^axes:"):
    search_thresholds(tree(rng), lambda params: 0.85, minimum=0.5, axes=(3,))


def test_sharded_network_is_cut_alike(rng, mesh):
  params = {"kernel": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)}

  def evaluate(params):
    return -float((params["kernel"] == 0).sum())

  one = search_thresholds(params, evaluate, minimum=-200)
  placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
  many = search_thresholds(placed, evaluate, minimum=-200)
  assert one.thresholds == many.thresholds and one.sparsity == {"kernel": 0.5}
  np.testing.assert_array_equal(one.params["kernel"], many.params["kernel"])
