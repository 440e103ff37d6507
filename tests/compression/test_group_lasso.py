"""The proximal step of the group lasso over groups of several arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compression_networks import assert_trees_close, random_variables, shard_last_axis

from distill_jax.compression.pruning.groups import Group, groups_of, under
from distill_jax.compression.pruning.layers import drop_layers, layers_of
from distill_jax.compression.pruning.shrink import living_channels, shrink
from distill_jax.compression.regularizers.groups import proximal_groups
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.zoo.cnn import CNN
from distill_jax.trees import named_leaves

# 8 query heads attend to 4 of keys and values.
DECODER = from_nnx(
  lambda rngs: Decoder(32, 16, 2, 8, num_kv_heads=4, head_dim=6, mlp_dim=16, rngs=rngs),
  inputs="tokens",
)


@pytest.fixture(scope="module")
def decoder():
  return random_variables(DECODER, np.random.default_rng(0))


def heads(params):
  return groups_of(params, head_dim=6)


def student_groups(params):
  return under("student", groups_of(params["student"]))


@functools.cache
def step_fn(groups):
  """Returns the jitted function `(params, updates, strength) -> params`."""

  @jax.jit
  def run(params, updates, strength):
    step = proximal_groups(groups, lambda count: strength)
    updates, _ = step.update(updates, step.init(params), params)
    return optax.apply_updates(params, updates)

  return run


def zeros_like(params):
  return jax.tree.map(np.zeros_like, params)


def expected_groups(params, slots, parts, amount):
  """Returns {path: new array} by the closed form, float64, one channel after the other."""
  new = {path: np.array(params[path], np.float64) for path, _ in slots}
  for channel in range(parts):
    pieces = []
    for path, axis in slots:
      width = new[path].shape[axis] // parts
      index = [slice(None)] * new[path].ndim
      index[axis] = slice(channel * width, (channel + 1) * width)
      pieces.append((path, tuple(index)))
    values = np.concatenate([new[path][index].ravel() for path, index in pieces])
    norm, level = np.linalg.norm(values), amount * np.sqrt(values.size)
    for path, index in pieces:
      new[path][index] *= (norm - level) / norm if norm > level else 0.0
  return new


def median_strength(params, slots, parts):
  """Returns the median root mean square of the channels: a strength that removes some of them."""
  squares = [np.moveaxis(np.float64(params[p]), a, 0).reshape(parts, -1) ** 2 for p, a in slots]
  return float(np.median(np.sqrt(np.concatenate(squares, 1).mean(1))))


def check(params, groups, slots, parts):
  """Compares one step with the closed form; returns the params before and after the step."""
  change = jax.tree.map(lambda w: 0.01 * np.cos(9 * w), params)
  updated = dict(named_leaves(jax.tree.map(lambda w, u: np.asarray(w) + u, params, change)))
  amount = median_strength(updated, slots, parts)
  new = dict(named_leaves(step_fn(groups)(params, change, amount)))
  expected = expected_groups(updated, slots, parts, amount)
  for path, value in expected.items():
    np.testing.assert_allclose(new[path], value, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(new[path]) == 0, value == 0)
  fraction = np.mean(next(iter(expected.values())) == 0)
  assert 0 < fraction < 1 or parts == 1
  return updated, new


def test_heads_match_numpy(decoder):
  slots = [(f"blocks/0/{part}/kernel", -1) for part in ("query", "key", "value")]
  updated, new = check(decoder.params, heads, slots, 4)
  for path in ("blocks/0/output/kernel", "embed/embedding"):
    np.testing.assert_allclose(new[path], updated[path], rtol=1e-6, atol=1e-8)


def test_neurons_and_blocks_match_numpy(decoder):
  neurons = [(f"blocks/1/{part}/kernel", -1) for part in ("gate", "up")]
  check(decoder.params, heads, neurons, 16)
  ends = [(f"blocks/1/{part}/kernel", 0) for part in ("output", "down")]
  check(decoder.params, layers_of, ends, 1)


def test_channels_match_numpy_and_norms_stay(rng):
  params = random_variables(from_nnx(lambda rngs: CNN(1, (8, 16), 10, rngs=rngs)), rng).params
  tree = {"student": params, "objective": {"kernel": jnp.ones((2, 2))}}
  updated, new = check(tree, student_groups, [("student/blocks/1/conv/kernel", -1)], 16)
  for path in ("student/blocks/1/norm/scale", "student/head/kernel", "objective/kernel"):
    np.testing.assert_allclose(new[path], updated[path], rtol=1e-6, atol=1e-8)


def test_dead_heads_and_blocks_are_removed(decoder):
  params = decoder.params
  groups = heads(params)
  slots = groups["blocks/0/attention"].writers
  slots = [slot for slot in slots if slot[0].endswith("kernel")]
  strength = median_strength(dict(named_leaves(params)), slots, 4)
  cut = step_fn(heads)(params, zeros_like(params), strength)
  living = living_channels(cut, groups)["blocks/0/attention"]
  assert 0 < living.sum() < 4
  small = shrink(decoder._replace(params=cut), groups)
  assert small.params["blocks"][0]["query"]["kernel"].shape[1] == 12 * living.sum()
  dead = step_fn(layers_of)(params, zeros_like(params), 100.0)
  assert len(drop_layers(decoder._replace(params=dead), layers_of(params)).params["blocks"]) == 1
  same = step_fn(heads)(params, zeros_like(params), 0.0)
  assert_trees_close(same, params, rtol=1e-6)


def test_bfloat16_groups_become_exactly_zero(rng):
  w = {
    name: jnp.asarray(rng.normal(size=(8, 4)) * [0.01, 0.02, 1, 1], jnp.bfloat16) for name in "ab"
  }
  new = step_fn(lambda params: {"g": Group((("a", 1), ("b", 1)), ())})(w, zeros_like(w), 0.2)
  for leaf in new.values():
    assert leaf.dtype == jnp.bfloat16
    assert (np.asarray(leaf) == 0).all(0).tolist() == [True, True, False, False]


def test_eight_devices_match_one(decoder, mesh):
  params = decoder.params
  slots = heads(params)["blocks/0/inner"].writers
  amount = median_strength(dict(named_leaves(params)), slots, 16)
  change = jax.tree.map(lambda w: 0.01 * np.cos(9 * w), params)
  one = step_fn(heads)(params, change, amount)
  many = step_fn(heads)(shard_last_axis(params, mesh), change, amount)
  assert_trees_close(many, one, rtol=1e-5, atol=1e-7)


def test_strength_follows_its_schedule():
  params = {"a": jnp.ones((2, 4))}
  step = proximal_groups({"g": Group((("a", 1),), ())}, lambda count: 0.1 * count)
  state, update = step.init(params), jax.jit(step.update)
  for expected in (1.0, 0.9, 0.7, 0.4, 0.0):
    updates, state = update(zeros_like(params), state, params)
    params = {"a": params["a"] + updates["a"]}
    np.testing.assert_allclose(params["a"], expected, atol=1e-6)


def test_invalid_arguments_raise():
  params = {"a": np.ones((2, 4)), "bias": np.ones(4)}
  group = Group((("a", 1), ("bias", 0)), ())
  with pytest.raises(ValueError, match="^strength:"):
    proximal_groups({"g": group}, -1)
  for groups, message in (
    ({}, "^groups:"),
    ({"g": Group((("b", 0),), ())}, "^group 'g': .*'b'"),
    ({"g": Group((("bias", 0),), ())}, r"^group 'g': .*\['bias'\]"),
    ({"g": group, "h": group}, "^groups: .* a in 'g' and 'h'"),
  ):
    with pytest.raises(ValueError, match=message):
      proximal_groups(groups, 1.0).init(params)
  step = proximal_groups({"g": group}, 1.0)
  with pytest.raises(ValueError, match="^params:"):
    step.update(params, step.init(params))
