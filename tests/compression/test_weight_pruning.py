import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compression_networks import shard_last_axis

from distill_jax import reduce
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.weights import (
  erk,
  hold_zeros,
  layer_sparsity,
  magnitude,
  prune,
  prune_n_by_m,
  saliency,
  sparsity,
)

ONCE = PolynomialSchedule(0, 0)


def network(rng):
  """Returns kernels of different sizes, the second ten times as large, and biases."""
  shapes = {"a": (3, 3, 4, 8), "b": (16, 8), "c": (8, 8)}
  return {
    name: {
      "kernel": jnp.asarray(rng.normal(size=shape) * (10 if name == "b" else 1), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
    }
    for name, shape in shapes.items()
  }


def gradients_of(params, step):
  return jax.tree.map(lambda w: jnp.cos(w * (step + 1)), params)


def train_fn(optimizer):
  """Returns a function that runs some steps, with one program for all its calls."""
  init = jax.jit(optimizer.init)

  @jax.jit
  def update(params, state, step):
    updates, state = optimizer.update(gradients_of(params, step), state, params)
    return optax.apply_updates(params, updates), state

  def train(params, steps, start=0, state=None):
    state = init(params) if state is None else state
    history = []
    for step in range(start, start + steps):
      params, state = update(params, state, step)
      history.append(params)
    return params, state, history

  return train


def train(optimizer, params, steps):
  return train_fn(optimizer)(params, steps)


def kernels(params):
  return {name: np.asarray(leaves["kernel"]) for name, leaves in params.items()}


def zhu_gupta(step, start, end, target):
  """Equation 1 with an initial sparsity of 0."""
  if step < start:
    return 0.0
  return target - target * (1 - (min(step, end) - start) / (end - start)) ** 3


# Where a weight is zero the gradient of `gradients_of` is largest, so the second score by itself
# would bring it back.
@pytest.mark.parametrize("score", [magnitude, lambda w, gradient: jnp.abs(gradient)])
def test_sparsity_of_each_layer_follows_the_cubic(rng, score):
  params = network(rng)
  schedule = PolynomialSchedule(2, 8, 2)
  optimizer = prune(optax.adam(1e-2), schedule, sparsity=0.8, score=score)
  _, state, history = train(optimizer, params, 12)
  before = kernels(params)
  for step, now in enumerate(history):
    last_update = max(2, min(8, step // 2 * 2))
    target = zhu_gupta(last_update, 2, 8, 0.8)
    for name, kernel in kernels(now).items():
      zeros = kernel.size - round(kernel.size * (1 - target))
      assert (kernel == 0).sum() == zeros, (step, name)
      assert (kernel[before[name] == 0] == 0).all()
      assert not (np.asarray(now[name]["bias"]) == 0).any()
      if score is magnitude and step % 2 == 0 and step <= 8:
        pruned = np.abs(before[name])[kernel == 0].max(initial=0)
        assert pruned <= np.abs(before[name])[kernel != 0].min()
    before = kernels(now)
  assert state.masks["a"]["kernel"].dtype == bool
  assert isinstance(state.masks["a"]["bias"], optax.MaskedNode)


@pytest.mark.parametrize("distribution", ["global", "erk"])
def test_distributions_prune_the_same_total(rng, distribution):
  params = network(rng)
  optimizer = prune(optax.sgd(0.0), ONCE, sparsity=0.75, distribution=distribution)
  now, _, _ = train(optimizer, params, 1)
  zeros, size = sparsity(now)
  assert size == sum(kernel.size for kernel in kernels(params).values())
  np.testing.assert_allclose(reduce.value((zeros, size)), 0.75, atol=0.005)
  if distribution == "global":
    flat = np.abs(np.concatenate([kernel.ravel() for kernel in kernels(params).values()]))
    remaining = np.concatenate([kernel.ravel() for kernel in kernels(now).values()]) != 0
    np.testing.assert_array_equal(remaining, flat >= np.sort(flat)[-remaining.sum()])
  else:
    sparsities = erk({name: kernel.shape for name, kernel in kernels(params).items()}, 0.75)
    for name, pair in layer_sparsity(now).items():
      np.testing.assert_allclose(reduce.value(pair), sparsities[name.split("/")[0]], atol=0.005)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.75, 0.99])
def test_erk_matches_bisection_on_its_scale(target):
  shapes = {"a": (3, 3, 1, 16), "b": (3, 3, 16, 32), "c": (3, 3, 32, 64), "head": (64, 10)}
  sizes = np.array([np.prod(shape) for shape in shapes.values()], np.float64)
  raw = np.array([sum(shape) for shape in shapes.values()]) / sizes
  low, high = 0.0, 1 / raw.min()
  for _ in range(200):
    middle = (low + high) / 2
    if (np.minimum(1, middle * raw) * sizes).sum() < (1 - target) * sizes.sum():
      low = middle
    else:
      high = middle
  expected = 1 - np.minimum(1, low * raw)
  np.testing.assert_allclose(list(erk(shapes, target).values()), expected, atol=1e-9)


def test_saliency_prunes_by_weight_times_gradient(rng):
  params = network(rng)
  now, _, _ = train(prune(optax.sgd(0.0), ONCE, sparsity=0.5, score=saliency), params, 1)
  before = kernels(params)
  for name, kernel in kernels(now).items():
    scores = np.abs(before[name] * np.cos(before[name]))
    remaining = kernel != 0
    assert scores[~remaining].max() <= scores[remaining].min()
    assert remaining.sum() == remaining.size // 2


@pytest.mark.parametrize("n, m, axis", [(2, 4, -2), (1, 4, -1), (4, 4, 0)])
def test_n_by_m_keeps_the_n_largest_of_m(rng, n, m, axis):
  params = {"kernel": jnp.asarray(rng.normal(size=(8, 4, 12)), jnp.float32)}
  now, _, history = train(prune_n_by_m(optax.sgd(1e-3), 1, n=n, m=m, axis=axis), params, 4)
  before = np.asarray(history[0]["kernel"])
  assert (before != 0).all()
  rows = np.moveaxis(before, axis, -1).reshape(-1, m)
  remaining = np.moveaxis(np.asarray(now["kernel"]), axis, -1).reshape(-1, m) != 0
  for values, mask in zip(rows, remaining, strict=True):
    assert set(np.flatnonzero(mask)) == set(np.argsort(-np.abs(values))[:n])


def test_first_of_equal_scores_and_at_least_one_remain():
  params = {"kernel": jnp.ones((4, 4))}
  now, _, _ = train(prune(optax.sgd(0.0), ONCE, sparsity=0.75), params, 1)
  np.testing.assert_array_equal(now["kernel"], np.eye(4)[0][:, None] * np.ones(4))
  now, _, _ = train(prune(optax.sgd(0.0), ONCE, sparsity=0.999), params, 1)
  assert (np.asarray(now["kernel"]) != 0).sum() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_stored_with_numpy_resumes_bit_for_bit(rng, dtype):
  params = jax.tree.map(lambda w: np.asarray(w).astype(dtype), network(rng))
  schedule = PolynomialSchedule(1, 7, 2)
  train = train_fn(prune(optax.adam(1e-2), schedule, sparsity=0.8, distribution="global"))
  full = train(params, 8)
  stored_params, stored_state = jax.tree.map(np.asarray, train(params, 4)[:2])
  resumed = train(stored_params, 4, 4, stored_state)
  for a, b in zip(jax.tree.leaves(full[:2]), jax.tree.leaves(resumed[:2]), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_eight_devices_match_one(rng, mesh):
  params = network(rng)
  schedule = PolynomialSchedule(0, 4, 2)
  optimizer = prune(optax.adam(1e-2), schedule, sparsity=0.5, distribution="global")
  train = train_fn(prune(optimizer, schedule, sparsity=0.8))
  one, state, _ = train(params, 6)
  many, many_state, _ = train(shard_last_axis(params, mesh), 6)
  assert len(many["a"]["kernel"].sharding.device_set) == 8
  pairs = zip(
    jax.tree.leaves((one, state.masks, state.inner.masks)),
    jax.tree.leaves((many, many_state.masks, many_state.inner.masks)),
    strict=True,
  )
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_at_the_start_stay_zero(rng, dtype):
  params = jax.tree.map(lambda w: np.maximum(np.asarray(w), 0).astype(dtype), network(rng))
  optimizer = hold_zeros(optax.adamw(0.1), "kernel$")

  @jax.jit
  def step(params, state, gradient):
    updates, state = optimizer.update(optax.tree.full_like(params, gradient), state, params)
    return optax.apply_updates(params, updates), state

  new, state = params, jax.jit(optimizer.init)(params)
  # Gradients that push all weights for a while, and then none: only momentum continues.
  for gradient in (1.0, -2.0, 3.0, 0.0, 0.0):
    new, state = step(new, state, gradient)
  for name, kernel in kernels(new).items():
    start = params[name]["kernel"]
    assert 0.3 < (start == 0).mean() < 0.7 and (kernel[start == 0] == 0).all()
    assert (kernel != start)[start != 0].mean() > 0.99
    assert (np.asarray(new[name]["bias"]) != 0).all() and kernel.dtype == dtype


def test_schedule_lists_its_updates():
  schedule = PolynomialSchedule(10, 50, 20)
  np.testing.assert_allclose(schedule.fractions(), [0, 1 - 0.5**3, 1])
  due, index = jax.vmap(schedule.at)(jnp.arange(100))
  assert np.flatnonzero(due).tolist() == [10, 30, 50]
  assert np.asarray(index)[[10, 30, 50]].tolist() == [0, 1, 2]
  assert dataclasses.astuple(PolynomialSchedule(3, 3)) == (3, 3, 1)
  assert PolynomialSchedule(3, 3).fractions().tolist() == [1]


def test_invalid_arguments_raise():
  params = {"kernel": np.ones((6, 2))}
  for value in (1.0, -0.1, float("nan")):
    with pytest.raises(ValueError, match="^sparsity:"):
      prune(optax.sgd(1.0), ONCE, sparsity=value)
  with pytest.raises(ValueError, match="^distribution: .*'global'"):
    prune(optax.sgd(1.0), ONCE, sparsity=0.5, distribution="globl")
  for step in (
    prune(optax.sgd(1.0), ONCE, sparsity=0.5, pattern="conv"),
    hold_zeros(optax.sgd(1.0), "conv"),
  ):
    with pytest.raises(ValueError, match="pattern"):
      step.init(params)
  with pytest.raises(ValueError, match="^n, m:"):
    prune_n_by_m(optax.sgd(1.0), 0, n=5)
  with pytest.raises(ValueError, match=r"^axis: .*-2 of kernel \[6, 2\]"):
    prune_n_by_m(optax.sgd(1.0), 0).init(params)
  with pytest.raises(ValueError, match="^update_end_step: .*4 or 6"):
    PolynomialSchedule(0, 5, 2)
  with pytest.raises(ValueError, match="^update_start_step, update_end_step:"):
    PolynomialSchedule(3, 2)
  with pytest.raises(ValueError, match="^update_freq:"):
    PolynomialSchedule(0, 2, 0)
  step = prune(optax.sgd(1.0), ONCE, sparsity=0.5)
  with pytest.raises(ValueError, match="^params:"):
    step.update(params, step.init(params))
