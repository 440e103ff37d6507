import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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


def network(rng):
  """Kernels of other sizes, the second ten times as large; and biases."""
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


def train(transformation, params, steps, start=0, state=None):
  state = jax.jit(transformation.init)(params) if state is None else state
  history = []

  @jax.jit
  def update(params, state, step):
    updates, state = transformation.update(gradients_of(params, step), state, params)
    return optax.apply_updates(params, updates), state

  for step in range(start, start + steps):
    params, state = update(params, state, step)
    history.append(params)
  return params, state, history


def zhu_gupta(step, start, end, target):
  """Equation 1 with an initial sparsity of 0."""
  if step < start:
    return 0.0
  return target - target * (1 - (min(step, end) - start) / (end - start)) ** 3


def zeros(params, name):
  return int((params[name]["kernel"] == 0).sum())


# Where a weight is zero the gradient of `gradients_of` is largest: by itself the second score would bring it back.
@pytest.mark.parametrize("score", [magnitude, lambda w, gradient: jnp.abs(gradient)])
def test_the_sparsity_of_each_layer_follows_the_cubic(rng, score):
  params = network(rng)
  schedule = PolynomialSchedule(2, 8, 2)
  _, state, history = train(
    prune(optax.adam(1e-2), schedule, sparsity=0.8, score=score), params, 12
  )
  for step, now in enumerate(history):
    made = max(2, min(8, step // 2 * 2))
    for name in params:
      size = params[name]["kernel"].size
      assert zeros(now, name) == size - round(size * (1 - zhu_gupta(made, 2, 8, 0.8))), (step, name)
      assert not (now[name]["bias"] == 0).any()
  assert state.masks["a"]["kernel"].dtype == bool
  assert isinstance(state.masks["a"]["bias"], optax.MaskedNode)


def test_what_is_pruned_is_the_smallest_and_stays_zero(rng):
  params = network(rng)
  _, _, history = train(prune(optax.adam(1e-2), PolynomialSchedule(0, 4), sparsity=0.7), params, 8)
  before = params
  for now in history:
    for name in params:
      old, new = np.asarray(before[name]["kernel"]), np.asarray(now[name]["kernel"])
      assert (new[old == 0] == 0).all()
      assert np.abs(old[new == 0]).max(initial=0) <= np.abs(old[new != 0]).min()
    before = now


@pytest.mark.parametrize("distribution", ["global", "erk"])
def test_distributions_prune_as_many_in_all(rng, distribution):
  params = network(rng)
  once = PolynomialSchedule(1, 1)
  now, _, _ = train(
    prune(optax.sgd(0.0), once, sparsity=0.75, distribution=distribution), params, 2
  )
  pair = sparsity(now)
  assert pair[1] == sum(leaf["kernel"].size for leaf in params.values())
  np.testing.assert_allclose(reduce.value(pair), 0.75, atol=0.005)
  if distribution == "global":
    flat = np.concatenate([np.asarray(params[name]["kernel"]).ravel() for name in params])
    kept = np.concatenate([np.asarray(now[name]["kernel"]).ravel() for name in params]) != 0
    np.testing.assert_array_equal(kept, np.abs(flat) >= np.sort(np.abs(flat))[-kept.sum()])
  else:
    shares = erk({name: leaf["kernel"].shape for name, leaf in params.items()}, 0.75)
    for name, pair in layer_sparsity(now).items():
      np.testing.assert_allclose(reduce.value(pair), shares[name.split("/")[0]], atol=0.005)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.75, 0.99])
def test_erk_equals_bisection_on_its_scale(target):
  shapes = {"a": (3, 3, 1, 16), "b": (3, 3, 16, 32), "c": (3, 3, 32, 64), "head": (64, 10)}
  sizes = np.array([np.prod(shape) for shape in shapes.values()], np.float64)
  raw = np.array([sum(shape) for shape in shapes.values()]) / sizes
  low, high = 0.0, 1 / raw.min()
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (
      (middle, high)
      if (np.minimum(1, middle * raw) * sizes).sum() < (1 - target) * sizes.sum()
      else (low, middle)
    )
  np.testing.assert_allclose(
    list(erk(shapes, target).values()), 1 - np.minimum(1, low * raw), atol=1e-9
  )


def test_saliency_prunes_by_weight_times_gradient(rng):
  params = network(rng)
  now, _, _ = train(
    prune(optax.sgd(0.0), PolynomialSchedule(0, 0), sparsity=0.5, score=saliency), params, 1
  )
  gradients = gradients_of(params, 0)
  for name in params:
    scores = np.abs(np.asarray(params[name]["kernel"] * gradients[name]["kernel"]))
    kept = np.asarray(now[name]["kernel"]) != 0
    assert scores[~kept].max() <= scores[kept].min() and kept.sum() == kept.size // 2


@pytest.mark.parametrize("n, m, axis", [(2, 4, -2), (1, 4, -1), (4, 4, 0)])
def test_n_by_m_keeps_the_n_largest_of_m(rng, n, m, axis):
  params = {"kernel": jnp.asarray(rng.normal(size=(8, 4, 12)), jnp.float32)}
  now, _, history = train(prune_n_by_m(optax.sgd(1e-3), 1, n=n, m=m, axis=axis), params, 4)
  assert (history[0]["kernel"] != 0).all()
  before = np.moveaxis(np.asarray(history[0]["kernel"]), axis, -1).reshape(-1, m)
  kept = np.moveaxis(np.asarray(now["kernel"]), axis, -1).reshape(-1, m) != 0
  for values, keep in zip(before, kept, strict=True):
    assert set(np.flatnonzero(keep)) == set(np.argsort(-np.abs(values))[:n])


def test_ties_are_broken_and_one_is_always_kept():
  params = {"kernel": jnp.ones((4, 4))}
  now, _, _ = train(prune(optax.sgd(0.0), PolynomialSchedule(0, 0), sparsity=0.75), params, 1)
  np.testing.assert_array_equal(now["kernel"], np.eye(4)[0][:, None] * np.ones(4))
  now, _, _ = train(prune(optax.sgd(0.0), PolynomialSchedule(0, 0), sparsity=0.999), params, 1)
  assert (now["kernel"] != 0).sum() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_that_went_through_numpy_goes_on_bit_for_bit(rng, dtype):
  params = jax.tree.map(lambda w: w.astype(dtype), network(rng))
  step = prune(optax.adam(1e-2), PolynomialSchedule(1, 7, 2), sparsity=0.8, distribution="global")
  whole = train(step, params, 8)
  half = train(step, params, 4)
  stored = jax.tree.map(np.asarray, half[:2])
  resumed = train(
    step, *jax.tree.map(jnp.asarray, (stored[0],)), 4, 4, jax.tree.map(jnp.asarray, stored[1])
  )
  for a, b in zip(jax.tree.leaves(whole[:2]), jax.tree.leaves(resumed[:2]), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_eight_devices_equal_one(rng, mesh, distribution):
  params = network(rng)
  step = prune(
    optax.adam(1e-2), PolynomialSchedule(0, 4, 2), sparsity=0.8, distribution=distribution
  )
  one, state, _ = train(step, params, 6)

  def outputs(x):
    return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "data"))

  placed = jax.device_put(params, jax.tree.map(outputs, params))
  many, many_state, _ = train(step, placed, 6)
  assert len(many["a"]["kernel"].sharding.device_set) == 8
  for a, b in zip(
    jax.tree.leaves((one, state.masks)), jax.tree.leaves((many, many_state.masks)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_start_at_zero_stay_there(rng, dtype):
  params = jax.tree.map(lambda w: jnp.maximum(w, 0).astype(dtype), network(rng))
  step = hold_zeros(optax.adamw(0.1), "kernel$")
  new, state = params, jax.jit(step.init)(params)
  update = jax.jit(step.update)
  # Gradients that push every weight for a while, and then none: momentum alone goes on.
  for gradient in (1.0, -2.0, 3.0, 0.0, 0.0):
    updates, state = update(optax.tree.full_like(params, gradient), state, new)
    new = optax.apply_updates(new, updates)
  for name, leaves in params.items():
    zero = leaves["kernel"] == 0
    assert 0.3 < zero.mean() < 0.7 and (new[name]["kernel"][zero] == 0).all()
    assert (new[name]["kernel"] != leaves["kernel"])[~zero].mean() > 0.99
    assert (new[name]["bias"] != 0).all() and new[name]["kernel"].dtype == dtype
  with pytest.raises(ValueError, match="fits no leaf"):
    hold_zeros(optax.sgd(0.1), "x$").init(params)


def test_a_schedule_knows_its_updates():
  schedule = PolynomialSchedule(10, 50, 20)
  np.testing.assert_allclose(schedule.shares(), [0, 1 - 0.5**3, 1])
  due = [step for step in range(100) if schedule.at(jnp.asarray(step))[0]]
  assert due == [10, 30, 50]
  assert [int(schedule.at(jnp.asarray(step))[1]) for step in due] == [0, 1, 2]
  assert dataclasses.astuple(PolynomialSchedule(3, 3)) == (3, 3, 1) and PolynomialSchedule(
    3, 3
  ).shares() == [1]


def test_what_cannot_be_is_refused():
  once, params = PolynomialSchedule(0, 0), {"kernel": jnp.ones((6, 2))}
  for value in (1.0, -0.1, float("nan")):
    with pytest.raises(ValueError, match=r"sparsity: expected a share in \[0, 1\), got"):
      prune(optax.sgd(1.0), once, sparsity=value)
  with pytest.raises(ValueError, match="did you mean 'global'"):
    prune(optax.sgd(1.0), once, sparsity=0.5, distribution="globl")
  with pytest.raises(ValueError, match="'conv' fits no leaf; some are kernel"):
    prune(optax.sgd(1.0), once, sparsity=0.5, pattern="conv").init(params)
  with pytest.raises(ValueError, match="1 <= n <= m, got 5 and 4"):
    prune_n_by_m(optax.sgd(1.0), 0, n=5)
  with pytest.raises(
    ValueError, match=r"kernel \[6, 2\]: axis -2 does not divide into parts of m=4"
  ):
    prune_n_by_m(optax.sgd(1.0), 0).init(params)
  with pytest.raises(ValueError, match="nearest: 4 or 6"):
    PolynomialSchedule(0, 5, 2)
  with pytest.raises(ValueError, match="expected 0 <= start <= end, got 3 and 2"):
    PolynomialSchedule(3, 2)
  with pytest.raises(ValueError, match="update_freq"):
    PolynomialSchedule(0, 2, 0)
  step = prune(optax.sgd(1.0), once, sparsity=0.5)
  with pytest.raises(ValueError, match="needs the parameters"):
    step.update(params, step.init(params))
