import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.regularizers import penalties
from distill_jax.compression.regularizers.penalties import INPUTS, OUTPUTS
from distill_jax.trees import matching

ALL_AXES = [OUTPUTS, INPUTS, (0, -1), ()]


def groups(w, axes):
  """The groups of a numpy array, each as (index, values)."""
  kept = sorted(axis % w.ndim for axis in axes)
  for at in np.ndindex(*(w.shape[axis] for axis in kept)):
    index = [slice(None)] * w.ndim
    for axis, i in zip(kept, at, strict=True):
      index[axis] = i
    yield tuple(index), w[tuple(index)]


def expected_penalty(name, w, axes):
  found = [values.ravel() for _, values in groups(w, axes)]
  if name == "group_lasso":
    return sum(np.sqrt(values.size) * np.sqrt((values**2).sum()) for values in found)
  if name == "l1_linf":
    return sum(np.abs(values).max() for values in found)
  return sum(np.sqrt((values**2).sum()) for values in found) ** 2 / (w**2).sum()


def project_l1(values, radius):
  """Onto the 1-ball, by bisection on the threshold."""
  if np.abs(values).sum() <= radius:
    return values
  low, high = 0.0, np.abs(values).max()
  for _ in range(200):
    middle = (low + high) / 2
    if np.maximum(np.abs(values) - middle, 0).sum() > radius:
      low = middle
    else:
      high = middle
  return np.sign(values) * np.maximum(np.abs(values) - high, 0)


def expected_prox(name, w, amount, axes):
  if name == "soft_threshold":
    return np.where(np.abs(w) > amount, w - amount * np.sign(w), 0.0)
  new = np.zeros_like(w)
  for index, values in groups(w, axes):
    if name == "group_soft_threshold":
      norm, level = np.linalg.norm(values.ravel()), amount * np.sqrt(values.size)
      new[index] = values * (norm - level) / norm if norm > level else 0.0
    else:
      new[index] = values - project_l1(values, amount)
      if np.abs(values).sum() <= amount:
        new[index] = 0.0
  return new


@pytest.mark.parametrize("axes", ALL_AXES)
@pytest.mark.parametrize("name", ["group_lasso", "l1_linf", "hoyer_square"])
def test_group_penalties_equal_numpy(rng, name, axes):
  tree = {
    "a": rng.normal(size=(3, 4, 5)).astype(np.float32),
    "b": rng.normal(size=(2, 3)).astype(np.float32),
  }
  value = getattr(penalties, name)(tree, axes=axes)
  expected = sum(expected_penalty(name, w.astype(np.float64), axes) for w in tree.values())
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_penalties_of_single_numbers_equal_numpy(rng):
  w = rng.normal(size=(3, 4)).astype(np.float32)
  v = w.astype(np.float64)
  np.testing.assert_allclose(penalties.l1({"w": w}), np.abs(v).sum(), rtol=1e-6)
  np.testing.assert_allclose(penalties.l2({"w": w}), 0.5 * (v**2).sum(), rtol=1e-6)
  np.testing.assert_allclose(
    penalties.hoyer_square({"w": w}), np.abs(v).sum() ** 2 / (v**2).sum(), rtol=1e-6
  )


@pytest.mark.parametrize(
  "penalty", [penalties.group_lasso, functools.partial(penalties.hoyer_square, axes=OUTPUTS)]
)
def test_the_gradient_at_zero_groups_is_zero(penalty):
  w = jnp.ones((3, 2)).at[:, 0].set(0)
  for weights in (w, 0 * w):
    gradient = jax.grad(penalty)(weights)
    assert jnp.isfinite(gradient).all() and (gradient[:, 0] == 0).all()


@pytest.mark.parametrize("amount", [0.0, 0.7])
@pytest.mark.parametrize("axes", ALL_AXES)
@pytest.mark.parametrize("name", ["soft_threshold", "group_soft_threshold", "linf_threshold"])
def test_proximal_steps_equal_numpy(rng, name, axes, amount):
  w = (rng.normal(size=(3, 4, 6)) * np.linspace(0.01, 1, 6)).astype(np.float32)
  options = {} if name == "soft_threshold" else {"axes": axes}
  step = penalties.proximal(getattr(penalties, name), amount, **options)
  params, change = {"w": jnp.asarray(w / 4)}, {"w": jnp.asarray(w * 3 / 4)}
  updates, _ = step.update(change, step.init(params), params)
  new = np.asarray(optax.apply_updates(params, updates)["w"])
  expected = expected_prox(name, w.astype(np.float64), amount, axes)
  np.testing.assert_allclose(new, expected, atol=1e-6)
  np.testing.assert_array_equal(new == 0, expected == 0)


@pytest.mark.parametrize("name", ["group_soft_threshold", "linf_threshold"])
def test_whole_groups_of_bfloat16_become_exactly_zero(rng, name):
  w = jnp.asarray(rng.normal(size=(8, 4)) * [0.01, 0.02, 1, 1], jnp.bfloat16)
  step = optax.chain(optax.sgd(0.1), penalties.proximal(getattr(penalties, name), 0.2))
  updates, _ = step.update(0.1 * w, step.init(w), w)
  new = optax.apply_updates(w, updates)
  assert new.dtype == jnp.bfloat16
  assert ((new == 0).all(0) == jnp.asarray([True, True, False, False])).all()


def test_add_penalty_is_the_gradient_and_follows_its_schedule():
  params = {"conv": {"kernel": jnp.asarray([1.0, -2.0]), "bias": jnp.asarray([3.0])}}
  step = penalties.add_penalty(penalties.l2, lambda count: 0.5 * count, pattern="kernel$")
  state, zeros = step.init(params), jax.tree.map(jnp.zeros_like, params)
  for expected in (0.0, 0.5, 1.0):
    updates, state = step.update(zeros, state, params)
    np.testing.assert_allclose(updates["conv"]["kernel"], expected * params["conv"]["kernel"])
    np.testing.assert_array_equal(updates["conv"]["bias"], 0)


def test_l2_equals_optax_weight_decay(rng):
  params = {"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
  gradients = {"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
  ours, theirs = penalties.add_penalty(penalties.l2, 0.3), optax.add_decayed_weights(0.3)
  np.testing.assert_allclose(
    ours.update(gradients, ours.init(params), params)[0]["a"],
    theirs.update(gradients, theirs.init(params), params)[0]["a"],
    rtol=1e-6,
  )


@pytest.mark.parametrize("name", ["soft_threshold", "group_soft_threshold", "linf_threshold"])
def test_eight_devices_equal_one(rng, mesh, name):
  w = jnp.asarray(rng.normal(size=(3, 16, 8)) * [1e-4, 1e-3, 1, 1, 1, 1, 1, 1], jnp.float32)
  step = optax.chain(
    penalties.add_penalty(penalties.group_lasso, 1e-2),
    optax.sgd(0.1),
    penalties.proximal(getattr(penalties, name), 0.05),
  )

  @jax.jit
  def run(w):
    updates, _ = step.update(0.1 * w, step.init(w), w)
    return optax.apply_updates(w, updates)

  one = run(w)
  assert 0 < (one == 0).sum() < one.size
  many = run(jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "data"))))
  np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(many == 0, one == 0)


def test_a_pattern_names_leaves_of_the_tree():
  tree = {"a": {"kernel": 1.0}}
  with pytest.raises(ValueError, match="'bias' fits no leaf; some are a/kernel"):
    matching(tree, "bias")
  with pytest.raises(ValueError, match="no regular expression"):
    matching(tree, "(")


def test_what_cannot_be_is_refused():
  with pytest.raises(
    ValueError, match="strength: expected a finite number >= 0 or a schedule, got -1"
  ):
    penalties.proximal(penalties.soft_threshold, -1)
  with pytest.raises(ValueError, match="strength"):
    penalties.add_penalty(penalties.l1, float("nan"))
  with pytest.raises(ValueError, match="fits no leaf"):
    penalties.add_penalty(penalties.l1, 1.0, pattern="x").init({"a": jnp.ones(2)})
  with pytest.raises(ValueError, match="axes: expected different axes"):
    penalties.group_lasso({"a": jnp.ones((2, 3))}, axes=(2,))
  with pytest.raises(ValueError, match="axes"):
    penalties.group_lasso({"a": jnp.ones((2, 3))}, axes=(1, -1))
  step = penalties.proximal(penalties.soft_threshold, 1.0)
  with pytest.raises(ValueError, match="needs the parameters"):
    step.update(jnp.ones(2), step.init(jnp.ones(2)))
