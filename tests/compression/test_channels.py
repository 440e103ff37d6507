import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compression_networks import output_fn, random_variables, shard_last_axis

from distill_jax.compression.pruning import channels
from distill_jax.compression.pruning.channels import prune_channels
from distill_jax.compression.pruning.groups import Group, groups_of, under, widths
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.shrink import living_channels, shrink
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.models.zoo.resnet import ResNet, WideResNet
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

ONCE = PolynomialSchedule(0, 0)
NETWORKS = {
  "mlp": from_nnx(lambda rngs: MLP(64, (16, 12), 10, rngs=rngs)),
  "cnn": from_nnx(lambda rngs: CNN(1, (8, 12, 16), 10, rngs=rngs)),
  "resnet": from_nnx(lambda rngs: ResNet(1, 14, 10, widths=(8, 8, 12, 16), rngs=rngs)),
}


def prune_once(params, groups, gradients=None, **options):
  step = prune_channels(optax.sgd(0.0), groups, ONCE, **options)

  @jax.jit
  def run(params, gradients):
    updates, state = step.update(gradients, step.init(params), params)
    return optax.apply_updates(params, updates), state

  return run(params, params if gradients is None else gradients)


# `test_rebuild` compares the outputs of the other networks.
def test_shrunk_resnet_matches_the_masked_one(rng):
  model = NETWORKS["resnet"]
  variables = random_variables(model, rng)
  groups = groups_of(variables.params)
  params, _ = prune_once(variables.params, groups, sparsity=0.5)
  masked = Variables(params, variables.state)
  small = shrink(masked, groups)
  batch = {"image": rng.normal(size=(2, 8, 8, 1)).astype(np.float32)}
  logits = output_fn(model, "logits", batch)
  dense, large, new = map(logits, (variables, masked, small))
  np.testing.assert_allclose(new, large, rtol=1e-5, atol=1e-5 * np.abs(large).max())
  assert np.abs(dense - large).max() > 0.1
  sizes = widths(groups, variables.params)
  assert widths(groups, small.params) == {group: round(size * 0.5) for group, size in sizes.items()}


def test_residual_sum_is_one_group(rng):
  variables = random_variables(NETWORKS["resnet"], rng)
  groups = groups_of(variables.params)
  # Stage 0 has no shortcut, so its blocks add to the stem's channels.
  assert widths(groups, variables.params) == {
    "stages/0/0/conv1": 8,
    "stages/0/1/conv1": 8,
    "stem": 8,
    "stages/1/0/conv1": 12,
    "stages/1/0": 12,
    "stages/1/1/conv1": 12,
    "stages/2/0/conv1": 16,
    "stages/2/0": 16,
    "stages/2/1/conv1": 16,
  }
  assert {name for name, _ in groups["stem"].readers} == {
    "stages/0/0/conv1/kernel",
    "stages/0/1/conv1/kernel",
    "stages/1/0/conv1/kernel",
    "stages/1/0/shortcut/layers/0/kernel",
  }
  slots = [slot for g in groups.values() for slot in (*g.writers, *g.readers)]
  assert len(slots) == len(set(slots))
  writers = {name for g in groups.values() for name, _ in g.writers}
  others = {name for name, _ in named_leaves(variables.params)} - writers
  assert others == {"head/kernel", "head/bias"}
  state = {name for g in groups.values() for name, _ in g.state}
  assert state == {name for name, _ in named_leaves(variables.state)}


def rows(leaf):
  return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])


@pytest.mark.parametrize("name", ["norm", "scale", "taylor"])
def test_scores_match_numpy(rng, name):
  variables = random_variables(NETWORKS["cnn"], rng)
  groups = groups_of(variables.params)
  params = dict(named_leaves(variables.params))
  gradients = {n: rng.normal(size=w.shape).astype(np.float32) for n, w in params.items()}
  k, s, b = (f"blocks/1/{part}" for part in ("conv/kernel", "norm/scale", "norm/bias"))
  expected = {
    "norm": np.sqrt((rows(params[k]) ** 2).mean(0)),
    "scale": np.abs(rows(params[s])[0]),
    "taylor": np.abs(sum((rows(params[n]) * rows(gradients[n])).sum(0) for n in (k, s, b))),
  }[name]
  score = getattr(channels, name)
  values = jax.jit(lambda p, g: score(p, g, groups["blocks/1"]))(params, gradients)
  np.testing.assert_allclose(values, expected, rtol=1e-4)
  tree = jax.tree.unflatten(jax.tree.structure(variables.params), list(gradients.values()))
  masked, _ = prune_once(variables.params, groups, tree, sparsity=0.25, score=score)
  dead = ~living_channels(masked, groups)["blocks/1"]
  assert set(np.flatnonzero(dead)) == set(np.argsort(expected)[:3])
  for part in (k, s, b):
    np.testing.assert_array_equal((rows(dict(named_leaves(masked))[part]) == 0).all(0), dead)


def test_global_pruning_keeps_a_channel_of_each_group(rng):
  params = random_variables(NETWORKS["cnn"], rng).params
  params["blocks"][0]["conv"]["kernel"] *= 1e-3
  groups = groups_of(params)
  masked, state = prune_once(params, groups, sparsity=0.5, distribution="global")
  living = {name: int(mask.sum()) for name, mask in living_channels(masked, groups).items()}
  assert living["blocks/0"] == 1 and sum(living.values()) == 18
  assert [int(mask.sum()) for mask in state.masks] == list(living.values())
  masked, _ = prune_once(params, groups, sparsity=0.99, distribution="global")
  assert [int(mask.sum()) for mask in living_channels(masked, groups).values()] == [1, 1, 1]


@pytest.mark.parametrize("score", [channels.scale, channels.taylor])
@pytest.mark.parametrize("fraction, remaining", [(0.5, 4), (0.9, 2)])
def test_equal_scores_keep_a_channel_of_each_group(score, fraction, remaining):
  params = {name: {"kernel": np.ones((3, 4)), "scale": np.ones(4)} for name in "ab"}
  groups = {name: Group(((f"{name}/kernel", 1), (f"{name}/scale", 0)), ()) for name in "ab"}
  gradients = jax.tree.map(np.zeros_like, params)
  _, state = prune_once(
    params, groups, gradients, sparsity=fraction, score=score, distribution="global"
  )
  counts = [int(np.sum(mask)) for mask in state.masks]
  assert min(counts) > 0 and sum(counts) == remaining


def test_gradual_pruning_on_eight_devices_matches_one(rng, mesh):
  variables = random_variables(NETWORKS["mlp"], rng)
  tree = {"student": variables.params, "objective": {"kernel": jnp.ones((2, 2))}}
  groups = under("student", groups_of(variables.params))

  def student_groups(params):
    return under("student", groups_of(params["student"]))

  schedule = PolynomialSchedule(0, 4, 2)
  step = prune_channels(optax.adam(1e-2), student_groups, schedule, sparsity=0.5)

  @jax.jit
  def update(params, state):
    updates, state = step.update(jax.tree.map(jnp.cos, params), state, params)
    return optax.apply_updates(params, updates), state

  def run(params):
    state, counts = jax.jit(step.init)(params), []
    for _ in range(6):
      params, state = update(params, state)
      counts.append(int(living_channels(params, groups)["hidden/0"].sum()))
    return params, state, counts

  one, state, counts = run(tree)
  assert counts == [16, 16, 9, 9, 8, 8]
  assert (np.asarray(one["objective"]["kernel"]) != 0).all()
  many, many_state, _ = run(shard_last_axis(tree, mesh))
  pairs = zip(
    jax.tree.leaves((one, state.masks)), jax.tree.leaves((many, many_state.masks)), strict=True
  )
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_channel_is_dead_if_all_its_writers_are_zero():
  params = {
    "kernel": np.asarray([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]),
    "bias": np.asarray([0.0, -2.0, 0.0]),
  }
  group = Group((("kernel", 1), ("bias", 0)), ())
  assert living_channels(params, {"g": group})["g"].tolist() == [False, True, True]


def test_dead_group_keeps_one_channel(rng):
  variables = random_variables(NETWORKS["mlp"], rng)
  params = variables.params
  params["hidden"][0] = jax.tree.map(jnp.zeros_like, params["hidden"][0])
  small = shrink(variables, groups_of(params))
  assert small.params["hidden"][0]["kernel"].shape == (64, 1)
  logits = output_fn(NETWORKS["mlp"], "logits", {"image": np.ones((2, 64), np.float32)})
  np.testing.assert_allclose(logits(small), logits(variables), atol=1e-6)


def test_invalid_arguments_raise(rng):
  variables = random_variables(NETWORKS["mlp"], rng)
  params, groups = variables.params, groups_of(variables.params)
  with pytest.raises(ValueError, match="^sparsity:"):
    prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=1)
  with pytest.raises(ValueError, match="^distribution:"):
    prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=0.5, distribution="erk")
  with pytest.raises(ValueError, match="^score:"):
    prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=0.5, score=channels.scale).init(params)
  with pytest.raises(ValueError, match="'student/hidden/0/kernel'.*'hidden/0/kernel'"):
    prune_channels(optax.sgd(0.0), under("student", groups), ONCE, sparsity=0.5).init(params)
  wide_resnet = from_nnx(lambda rngs: WideResNet(1, 10, 1, 10, rngs=rngs))
  unknown = jax.eval_shape(wide_resnet.init, jax.random.key(0), {}).params
  for tree in ({"a": np.ones(2)}, unknown):
    with pytest.raises(ValueError, match="^params:"):
      groups_of(tree)


def test_groups_that_do_not_fit_raise(rng):
  variables = random_variables(NETWORKS["mlp"], rng)
  bias = ("hidden/0/bias", 0)
  for groups, message in (
    ({"g": Group((("hidden/0/kernel", -1),), (("head/kernel", 0),))}, "^group 'g': .*16, .*12}"),
    ({"g": Group((("hidden/0/bias", 1),), ())}, r"^group 'g': .*hidden/0/bias \[16\], got 1"),
    ({}, "^groups:"),
    ({"g": Group((bias,), (), (("norm/mean", 0),))}, "^group 'g': .*'norm/mean'"),
  ):
    with pytest.raises(ValueError, match=message):
      shrink(variables, groups)
  statistics = Variables(variables.params, {"mean": np.ones(15)})
  with pytest.raises(ValueError, match=r"^group 'g': expected 16 .*mean, got \[15\]"):
    shrink(statistics, {"g": Group((bias,), (), (("mean", 0),))})
