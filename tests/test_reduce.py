"""Means of valid rows are exact: masks, merged pairs, and any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses, reduce


def test_masked_mean_is_the_mean_of_the_valid_rows(rng):
  values, where = rng.random(size=(7, 3)), np.array([1, 1, 0, 1, 0, 0, 1], bool)
  values[2] = np.nan
  np.testing.assert_allclose(
    reduce.mean(jnp.asarray(values), jnp.asarray(where)), values[where].mean(), rtol=1e-6
  )


def test_masked_values_reach_no_gradient():
  def loss(x):
    return reduce.mean(jnp.log(x), jnp.array([True, False]))

  gradient = jax.grad(loss)(jnp.array([2.0, 1.0]))
  np.testing.assert_allclose(gradient, [0.5, 0.0])


def test_empty_mask_is_zero_with_a_finite_gradient():
  gradient = jax.grad(lambda x: reduce.mean(x, jnp.zeros(3, bool)))(jnp.ones(3))
  assert reduce.mean(jnp.ones(3), jnp.zeros(3, bool)) == 0
  np.testing.assert_array_equal(gradient, 0)


def test_low_precision_is_summed_in_float32():
  # The sum is above the largest float16.
  assert reduce.mean(jnp.ones(70_000, jnp.float16) * 2) == 2
  assert reduce.mean(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("where", [np.ones(3, bool), np.ones((2, 2), bool), np.ones(2, np.float32)])
def test_masks_that_do_not_fit_raise(where):
  with pytest.raises(ValueError, match=r"^where: "):
    reduce.mean(jnp.ones((2, 3)), where)


def test_merged_pairs_have_the_mean_of_all_values(rng):
  values, where = rng.normal(size=11), rng.random(11) > 0.4
  parts = [
    {"loss": reduce.total(jnp.asarray(values[s]), jnp.asarray(where[s]))}
    for s in (slice(0, 2), slice(2, 7), slice(7, 11))
  ]
  merged = reduce.merge(*parts)
  np.testing.assert_allclose(reduce.value(merged["loss"]), values[where].mean(), rtol=1e-6)
  assert reduce.merge() == {}


def test_one_eight_and_mapped_devices_agree(mesh, rng):
  values, where = rng.normal(size=(16,)).astype(np.float32), np.arange(16) < 5
  expected = values[where].mean()
  sharded = jax.device_put((values, where), NamedSharding(mesh, PartitionSpec("data")))
  np.testing.assert_allclose(jax.jit(reduce.mean)(*sharded), expected, rtol=1e-6)

  def mapped(v, w):
    return reduce.mean(v, w, axis_name="data")

  np.testing.assert_allclose(
    jax.pmap(mapped, "data")(values.reshape(8, 2), where.reshape(8, 2)), expected, rtol=1e-6
  )
  spec = PartitionSpec("data")
  shard = jax.shard_map(mapped, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
  np.testing.assert_allclose(jax.jit(shard)(values, where), expected, rtol=1e-6)


DIRT = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("dirt", DIRT)
def test_blank_rows_reach_neither_value_nor_gradient(dirt):
  student = jnp.ones((1, 2, 3)).at[0, 1].set(dirt)
  teacher = jnp.array([[[1.0, 2.0, 0.5], [dirt] * 3]])
  where = jnp.array([[True, False]])

  def loss(student, teacher):
    student, teacher = reduce.blank(where, student, teacher)
    return reduce.mean(losses.kl_divergence(student, teacher), where)

  value, gradients = jax.value_and_grad(loss, (0, 1))(student, teacher)
  p = np.exp([1.0, 2.0, 0.5]) / np.exp([1.0, 2.0, 0.5]).sum()
  np.testing.assert_allclose(value, (p * np.log(3 * p)).sum(), rtol=1e-5)
  np.testing.assert_allclose(gradients[0][0, 0], 1 / 3 - p, rtol=1e-5)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient[0, 1], 0)


def test_blank_takes_trees_and_leaves_integers():
  where = np.array([True, False])
  targets = losses.top_k(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), 1)
  blanked, image = reduce.blank(where, targets, np.full((2, 3), np.nan, np.float16))
  np.testing.assert_array_equal(blanked.indices, targets.indices)
  np.testing.assert_array_equal(blanked.log_probs[0], targets.log_probs[0])
  assert blanked.log_probs[1] == blanked.log_tail[1] == 0
  assert image.dtype == np.float16 and np.isnan(image[0]).all() and (image[1] == 0).all()
  assert reduce.blank(None, targets) is not None
  np.testing.assert_array_equal(reduce.blank(None, image), image)
  for invalid in (np.ones(3, bool), np.ones(2)):
    with pytest.raises(ValueError, match=r"^where: "):
      reduce.blank(invalid, image)
