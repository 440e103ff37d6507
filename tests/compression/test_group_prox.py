"""The proximal step of the group lasso over groups of several arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.pruning.groups import Group, groups_of, under
from distill_jax.compression.pruning.layers import drop_layers, layers_of
from distill_jax.compression.pruning.shrink import alive, shrink
from distill_jax.compression.regularizers.groups import proximal_groups
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.zoo.cnn import CNN
from distill_jax.trees import named_leaves

# 8 query heads look at 4 of keys and values.
DECODER = from_nnx(
  lambda rngs: Decoder(32, 16, 2, 8, kv_heads=4, head_width=6, inner=16, rngs=rngs), inputs="tokens"
)


def decoder():
  return jax.jit(DECODER.init)(jax.random.key(0), {})


def heads(params):
  return groups_of(params, head_width=6)


def stepped(params, groups, strength, change=0.0):
  step = proximal_groups(groups, strength)

  @jax.jit
  def run(params):
    updates, _ = step.update(
      jax.tree.map(lambda w: change * jnp.cos(9 * w), params), step.init(params), params
    )
    return optax.apply_updates(params, updates)

  return run(params)


def expected_groups(params, slots, parts, amount):
  """{path: new array} by the closed form, float64: a channel is cut out of all kernels, axis by axis."""
  new = {path: np.array(params[path], np.float64) for path, _ in slots}
  for channel in range(parts):
    pieces = []
    for path, axis in slots:
      width = new[path].shape[axis] // parts
      index = [slice(None)] * new[path].ndim
      index[axis] = slice(channel * width, (channel + 1) * width)
      pieces.append((path, tuple(index)))
    numbers = np.concatenate([new[path][index].ravel() for path, index in pieces])
    norm, level = np.linalg.norm(numbers), amount * np.sqrt(numbers.size)
    for path, index in pieces:
      new[path][index] *= (norm - level) / norm if norm > level else 0.0
  return new


def between(params, slots, parts):
  """A strength that some of the channels do not survive: the median root mean square."""
  zeros = expected_groups(params, slots, parts, 0.0)
  squares = [np.moveaxis(zeros[p], a, 0).reshape(parts, -1) ** 2 for p, a in slots]
  return float(np.median(np.sqrt(np.concatenate(squares, 1).mean(1))))


def check(params, groups, name, slots, parts):
  moved = dict(named_leaves(jax.tree.map(lambda w: w + 0.01 * jnp.cos(9 * w), params)))
  amount = between(moved, slots, parts)
  new = dict(named_leaves(stepped(params, groups, amount, change=0.01)))
  expected = expected_groups(moved, slots, parts, amount)
  for path, value in expected.items():
    np.testing.assert_allclose(new[path], value, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(new[path]) == 0, value == 0)
  zeros = [np.mean(value == 0) for value in expected.values()]
  assert 0 < zeros[0] < 1 or parts == 1, name
  return moved, new


def test_heads_of_queries_keys_and_values_equal_numpy():
  params = decoder().params
  slots = [(f"blocks/0/{part}/kernel", -1) for part in ("query", "key", "value")]
  moved, new = check(params, heads, "heads", slots, 4)
  for path in ("blocks/0/output/kernel", "embed/embedding"):
    np.testing.assert_allclose(new[path], moved[path], rtol=1e-6, atol=1e-8)


def test_neurons_and_blocks_equal_numpy():
  params = decoder().params
  check(params, heads, "neurons", [(f"blocks/1/{part}/kernel", -1) for part in ("gate", "up")], 16)
  check(
    params, layers_of, "blocks", [(f"blocks/1/{part}/kernel", 0) for part in ("output", "down")], 1
  )


def test_channels_of_a_cnn_equal_numpy_and_their_norms_stay():
  params = from_nnx(lambda rngs: CNN(1, (8, 16), 10, rngs=rngs)).init(jax.random.key(0), {}).params
  tree = {"student": params, "objective": {"kernel": jnp.ones((2, 2))}}
  moved, new = check(
    tree,
    lambda p: under("student", groups_of(p["student"])),
    "cnn",
    [("student/blocks/1/conv/kernel", -1)],
    16,
  )
  for path in ("student/blocks/1/norm/scale", "student/head/kernel", "objective/kernel"):
    np.testing.assert_allclose(new[path], moved[path], rtol=1e-6, atol=1e-8)


def test_dead_heads_neurons_and_blocks_are_removed(rng):
  params, state = decoder()
  groups = heads(params)
  cut = stepped(
    params,
    groups,
    between(dict(named_leaves(params)), list(groups["blocks/0/attention"].writers), 4),
  )
  kept = alive(cut, groups)["blocks/0/attention"]
  assert 0 < kept.sum() < 4
  small = shrink(decoder()._replace(params=cut), groups)
  assert small.params["blocks"][0]["query"]["kernel"].shape[1] == 12 * kept.sum()
  ends = {"blocks/1": layers_of(params)["blocks/1"]}
  assert (
    len(
      drop_layers(decoder()._replace(params=stepped(params, ends, 1.0)), layers_of(params)).params[
        "blocks"
      ]
    )
    == 1
  )
  same = stepped(params, groups, 0.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), same, params)


def test_bfloat16_groups_become_exactly_zero(rng):
  w = {
    name: jnp.asarray(rng.normal(size=(8, 4)) * [0.01, 0.02, 1, 1], jnp.bfloat16) for name in "ab"
  }
  new = stepped(w, {"g": Group((("a", 1), ("b", 1)), ())}, 0.2, change=0.001)
  for leaf in new.values():
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal((leaf == 0).all(0), [True, True, False, False])


def test_eight_devices_equal_one(mesh):
  params = decoder().params
  amount = between(dict(named_leaves(params)), list(heads(params)["blocks/0/inner"].writers), 16)

  def last(w):
    return NamedSharding(
      mesh, PartitionSpec(*[None] * (w.ndim - 1), "data" if w.shape[-1] % 8 == 0 else None)
    )

  one = stepped(params, heads, amount, change=0.01)
  many = stepped(jax.device_put(params, jax.tree.map(last, params)), heads, amount, change=0.01)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(b == 0, a == 0)


def test_the_strength_follows_its_schedule():
  params = {"a": jnp.ones((2, 4))}
  step = proximal_groups({"g": Group((("a", 1),), ())}, lambda count: 0.1 * count)
  state = step.init(params)
  for expected in (1.0, 0.9, 0.7, 0.4, 0.0):
    updates, state = step.update(jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["a"], expected, atol=1e-6)


def test_what_cannot_be_is_refused():
  params = {"a": jnp.ones((2, 4)), "bias": jnp.ones(4)}
  group = Group((("a", 1), ("bias", 0)), ())
  with pytest.raises(
    ValueError, match="strength: expected a finite number >= 0 or a schedule, got -1"
  ):
    proximal_groups({"g": group}, -1)
  for groups, message in (
    ({}, "at least one"),
    ({"g": Group((("b", 0),), ())}, "there is no 'b'"),
    ({"g": Group((("bias", 0),), ())}, r"group 'g': expected a kernel, got writers \['bias'\]"),
    ({"g": group, "h": group}, "expected each kernel in one group, once, got a in 'g' and 'h'"),
  ):
    with pytest.raises(ValueError, match=message):
      proximal_groups(groups, 1.0).init(params)
  step = proximal_groups({"g": group}, 1.0)
  with pytest.raises(ValueError, match="needs the parameters"):
    step.update(params, step.init(params))
