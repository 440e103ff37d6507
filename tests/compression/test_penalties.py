import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.regularizers import penalties
from distill_jax.compression.regularizers.penalties import INPUTS, OUTPUTS
from distill_jax.trees import path_mask

ALL_AXES = [OUTPUTS, INPUTS, (0, -1), ()]
PROXIMAL_STEPS = ["soft_threshold", "group_soft_threshold", "linf_threshold"]


def groups(w, axes):
  """Iterates over the groups of a numpy array, each as (index, values)."""
  axes = sorted(axis % w.ndim for axis in axes)
  for position in np.ndindex(*(w.shape[axis] for axis in axes)):
    index = [slice(None)] * w.ndim
    for axis, i in zip(axes, position, strict=True):
      index[axis] = i
    yield tuple(index), w[tuple(index)]


def expected_penalty(name, w, axes):
  parts = [values.ravel() for _, values in groups(w, axes)]
  if name == "group_lasso":
    return sum(np.sqrt(values.size) * np.sqrt((values**2).sum()) for values in parts)
  if name == "l1_linf":
    return sum(np.abs(values).max() for values in parts)
  return sum(np.sqrt((values**2).sum()) for values in parts) ** 2 / (w**2).sum()


def project_l1(values, radius):
  """Projects onto the 1-ball, by bisection on the threshold."""
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


def apply_step(step, change, params):
  """Returns the params after one update, jitted."""

  @jax.jit
  def run(change, params):
    updates, _ = step.update(change, step.init(params), params)
    return optax.apply_updates(params, updates)

  return run(change, params)


@pytest.mark.parametrize("name", ["group_lasso", "l1_linf", "hoyer_square"])
def test_group_penalties_match_numpy(rng, name):
  a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4, 5), (2, 3)))
  penalty = getattr(penalties, name)
  run = jax.jit(lambda tree: [penalty(tree, axes=axes) for axes in ALL_AXES])
  for value, axes in zip(run({"a": a, "b": b}), ALL_AXES, strict=True):
    expected = sum(expected_penalty(name, w.astype(np.float64), axes) for w in (a, b))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_penalties_of_single_values_match_numpy(rng):
  w = rng.normal(size=(3, 4)).astype(np.float32)
  v = w.astype(np.float64)
  run = jax.jit(lambda tree: [penalties.l1(tree), penalties.l2(tree), penalties.hoyer_square(tree)])
  expected = [np.abs(v).sum(), 0.5 * (v**2).sum(), np.abs(v).sum() ** 2 / (v**2).sum()]
  np.testing.assert_allclose(run({"w": w}), expected, rtol=1e-6)


@pytest.mark.parametrize(
  "penalty", [penalties.group_lasso, functools.partial(penalties.hoyer_square, axes=OUTPUTS)]
)
def test_gradient_of_zero_groups_is_zero(penalty):
  gradient_fn = jax.jit(jax.grad(penalty))
  w = np.array([[0, 1]] * 3, np.float32)
  for weights in (w, 0 * w):
    gradient = np.asarray(gradient_fn(weights))
    assert np.isfinite(gradient).all() and (gradient[:, 0] == 0).all()


@pytest.mark.parametrize("name", PROXIMAL_STEPS)
def test_proximal_steps_match_numpy(rng, name):
  axes_of = {"a": None} if name == "soft_threshold" else dict(zip("abcd", ALL_AXES))
  amounts = np.array([0.0, 0.7], np.float32)
  prox = getattr(penalties, name)
  step = optax.chain(
    *(
      penalties.proximal(
        prox,
        lambda i: jnp.asarray(amounts)[i],
        pattern=key,
        **({"axes": axes} if axes is not None else {}),
      )
      for key, axes in axes_of.items()
    )
  )
  w = (rng.normal(size=(3, 4, 6)) * np.linspace(0.01, 1, 6)).astype(np.float32)
  params, change = (dict.fromkeys(axes_of, fraction * w) for fraction in (0.25, 0.75))
  update, state = jax.jit(step.update), step.init(params)
  for amount in amounts.tolist():
    updates, state = update(change, state, params)
    for key, axes in axes_of.items():
      new = params[key] + np.asarray(updates[key])
      expected = expected_prox(name, w.astype(np.float64), amount, axes)
      np.testing.assert_allclose(new, expected, atol=1e-6)
      np.testing.assert_array_equal(new == 0, expected == 0)


@pytest.mark.parametrize("name", ["group_soft_threshold", "linf_threshold"])
def test_bfloat16_groups_become_exactly_zero(rng, name):
  w = jnp.asarray(rng.normal(size=(8, 4)) * [0.01, 0.02, 1, 1], jnp.bfloat16)
  step = optax.chain(optax.sgd(0.1), penalties.proximal(getattr(penalties, name), 0.2))
  new = apply_step(step, (w * 0.1).astype(jnp.bfloat16), w)
  assert new.dtype == jnp.bfloat16
  assert (np.asarray(new) == 0).all(0).tolist() == [True, True, False, False]


def test_add_penalty_adds_the_scheduled_gradient():
  params = {"conv": {"kernel": jnp.asarray([1.0, -2.0]), "bias": jnp.asarray([3.0])}}
  step = penalties.add_penalty(penalties.l2, lambda count: 0.5 * count, pattern="kernel$")
  state, zeros = step.init(params), jax.tree.map(np.zeros_like, params)
  update = jax.jit(step.update)
  for expected in (0.0, 0.5, 1.0):
    updates, state = update(zeros, state, params)
    np.testing.assert_allclose(updates["conv"]["kernel"], [expected, -2 * expected])
    np.testing.assert_array_equal(updates["conv"]["bias"], 0)


def test_l2_matches_optax_weight_decay(rng):
  params, gradients = (rng.normal(size=(3, 2)).astype(np.float32) for _ in range(2))
  step = penalties.add_penalty(penalties.l2, 0.3)
  updates, _ = jax.jit(step.update)(gradients, step.init(params), params)
  expected, _ = optax.add_decayed_weights(0.3).update(gradients, optax.EmptyState(), params)
  np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("name", PROXIMAL_STEPS)
def test_eight_devices_match_one(rng, mesh, name):
  w = jnp.asarray(rng.normal(size=(3, 16, 8)) * [1e-4, 1e-3, 1, 1, 1, 1, 1, 1], jnp.float32)
  step = optax.chain(
    penalties.add_penalty(penalties.group_lasso, 1e-2),
    optax.sgd(0.1),
    penalties.proximal(getattr(penalties, name), 0.05),
  )
  one = np.asarray(apply_step(step, w, w))
  assert 0 < (one == 0).sum() < one.size
  sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "data")))
  many = np.asarray(apply_step(step, sharded, sharded))
  np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(many == 0, one == 0)


def test_patterns_without_a_leaf_raise():
  tree = {"a": {"kernel": 1.0}}
  for pattern in ("bias", "("):
    with pytest.raises(ValueError, match="pattern"):
      path_mask(tree, pattern)


def test_invalid_arguments_raise():
  params = {"a": np.ones((2, 3), np.float32)}
  for strength in (-1, float("nan")):
    with pytest.raises(ValueError, match="^strength:"):
      penalties.proximal(penalties.soft_threshold, strength)
    with pytest.raises(ValueError, match="^strength:"):
      penalties.add_penalty(penalties.l1, strength)
  with pytest.raises(ValueError, match="pattern"):
    penalties.add_penalty(penalties.l1, 1.0, pattern="x").init(params)
  for axes in ((2,), (1, -1)):
    with pytest.raises(ValueError, match="^axes:"):
      penalties.group_lasso(params, axes=axes)
  step = penalties.proximal(penalties.soft_threshold, 1.0)
  with pytest.raises(ValueError, match="^params:"):
    step.update(params, step.init(params))
