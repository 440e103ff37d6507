import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.pruning import channels
from distill_jax.compression.pruning.channels import prune_channels
from distill_jax.compression.pruning.groups import Group, groups_of, under, widths
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.shrink import alive, shrink
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.models.zoo.resnet import ResNet, WideResNet
from distill_jax.models.zoo.vgg import VGG
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

ONCE = PolynomialSchedule(0, 0)
NETWORKS = {
  "mlp": (lambda rngs: MLP(64, (16, 12), 10, rngs=rngs), [16, 12]),
  "cnn": (lambda rngs: CNN(1, (8, 12, 16), 10, rngs=rngs), [8, 12, 16]),
  "vgg": (lambda rngs: VGG(1, 11, 10, width=0.125, rngs=rngs), [8, 16, 32, 32, 64, 64, 64, 64]),
  "resnet": (lambda rngs: ResNet(1, 14, 10, widths=(8, 8, 12, 16), rngs=rngs), None),
}


def network(name, rng):
  """The model, and variables in which no number has the value that it starts from."""
  model = from_nnx(NETWORKS[name][0])
  start = jax.jit(model.init)(jax.random.key(0), {})

  def moved(w):
    new = w + 0.2 * rng.normal(size=w.shape)
    return jnp.asarray(np.abs(new) if (w == 1).all() else new, w.dtype)  # variances stay positive

  return model, jax.tree.map(moved, start)


def pruned(params, groups, gradients=None, schedule=ONCE, **options):
  step = prune_channels(optax.sgd(0.0), groups, schedule, **options)

  @jax.jit
  def run(params, gradients):
    updates, state = step.update(gradients, step.init(params), params)
    return optax.apply_updates(params, updates), state

  return run(params, params if gradients is None else gradients)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunk_network_says_what_the_masked_one_says(rng, name):
  model, variables = network(name, rng)
  groups = groups_of(variables.params)
  masked, _ = pruned(variables.params, groups, sparsity=0.5)
  small = shrink(Variables(masked, variables.state), groups)
  batch = {"image": jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)}
  logits = jax.jit(lambda v: model.apply(*v, batch, train=False, key=None)[0]["logits"])
  dense, large, new = map(logits, (variables, Variables(masked, variables.state), small))
  np.testing.assert_allclose(new, large, rtol=1e-5, atol=1e-5)
  assert np.abs(dense - large).max() > 0.1
  sizes = widths(groups, variables.params)
  assert widths(groups, small.params) == {group: round(size * 0.5) for group, size in sizes.items()}
  if NETWORKS[name][1]:
    assert list(sizes.values()) == NETWORKS[name][1]
  assert sum(w.size for w in jax.tree.leaves(small)) < 0.6 * sum(
    w.size for w in jax.tree.leaves(variables)
  )


def test_a_residual_sum_is_one_group_with_all_that_touches_it(rng):
  _, variables = network("resnet", rng)
  groups = groups_of(variables.params)
  # Stage 0 has no shortcut of its own, so its blocks add to the stem's channels.
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
  } and {name for name, _ in groups["stem"].readers} == {
    "stages/0/0/conv1/kernel",
    "stages/0/1/conv1/kernel",
    "stages/1/0/conv1/kernel",
    "stages/1/0/shortcut/layers/0/kernel",
  }
  touched = [slot for g in groups.values() for slot in (*g.writers, *g.readers)]
  assert len(touched) == len(set(touched))
  written = {name for g in groups.values() for name, _ in g.writers}
  assert {name for name, _ in named_leaves(variables.params)} - written == {
    "head/kernel",
    "head/bias",
  }
  kept = {name for g in groups.values() for name, _ in g.state}
  assert kept == {name for name, _ in named_leaves(variables.state)}


def rows(leaf):
  return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])


@pytest.mark.parametrize("name", ["norm", "scale", "taylor"])
def test_scores_equal_numpy(rng, name):
  _, variables = network("cnn", rng)
  groups = groups_of(variables.params)
  params = dict(named_leaves(variables.params))
  gradients = {n: jnp.asarray(rng.normal(size=w.shape), jnp.float32) for n, w in params.items()}
  k, s, b = (f"blocks/1/{part}" for part in ("conv/kernel", "norm/scale", "norm/bias"))
  expected = {
    "norm": np.sqrt((rows(params[k]) ** 2).mean(0)),
    "scale": np.abs(rows(params[s])[0]),
    "taylor": np.abs(sum((rows(params[n]) * rows(gradients[n])).sum(0) for n in (k, s, b))),
  }[name]
  score = getattr(channels, name)
  np.testing.assert_allclose(score(params, gradients, groups["blocks/1"]), expected, rtol=1e-4)
  tree = jax.tree.unflatten(jax.tree.structure(variables.params), list(gradients.values()))
  masked, _ = pruned(variables.params, groups, tree, sparsity=0.25, score=score)
  dead = ~alive(masked, groups)["blocks/1"]
  assert set(np.flatnonzero(dead)) == set(np.argsort(expected)[:3])
  for part in (k, s, b):
    np.testing.assert_array_equal((rows(dict(named_leaves(masked))[part]) == 0).all(0), dead)


def test_global_pruning_leaves_every_group_a_channel(rng):
  _, variables = network("cnn", rng)
  params = variables.params
  params["blocks"][0]["conv"]["kernel"] *= 1e-3
  groups = groups_of(params)
  masked, state = pruned(params, groups, sparsity=0.5, distribution="global")
  kept = {name: int(mask.sum()) for name, mask in alive(masked, groups).items()}
  assert kept["blocks/0"] == 1 and sum(kept.values()) == 18
  assert [int(mask.sum()) for mask in state.masks] == list(kept.values())
  masked, _ = pruned(params, groups, sparsity=0.99, distribution="global")
  assert [int(mask.sum()) for mask in alive(masked, groups).values()] == [1, 1, 1]


@pytest.mark.parametrize("score", [channels.scale, channels.taylor])
@pytest.mark.parametrize("share, kept", [(0.5, 4), (0.9, 2)])
def test_where_all_scores_are_equal_every_group_keeps_a_channel(score, share, kept):
  params = {name: {"kernel": jnp.ones((3, 4)), "scale": jnp.ones(4)} for name in "ab"}
  groups = {name: Group(((f"{name}/kernel", 1), (f"{name}/scale", 0)), ()) for name in "ab"}
  gradients = jax.tree.map(jnp.zeros_like, params)
  _, state = pruned(params, groups, gradients, sparsity=share, score=score, distribution="global")
  assert (
    all(mask.any() for mask in state.masks) and sum(int(mask.sum()) for mask in state.masks) == kept
  )


def test_a_train_state_is_pruned_gradually_and_alike_on_eight_devices(rng, mesh):
  _, variables = network("cnn", rng)
  tree = {"student": variables.params, "objective": {"kernel": jnp.ones((2, 2))}}
  groups = under("student", groups_of(variables.params))

  def of(params):
    return under("student", groups_of(params["student"]))

  step = prune_channels(optax.adam(1e-2), of, PolynomialSchedule(0, 4, 2), sparsity=0.5)

  @jax.jit
  def update(params, state):
    updates, state = step.update(jax.tree.map(jnp.cos, params), state, params)
    return optax.apply_updates(params, updates), state

  def run(params):
    state, counts = jax.jit(step.init)(params), []
    for _ in range(6):
      params, state = update(params, state)
      counts.append(int(alive(params, groups)["blocks/2"].sum()))
    return params, state, counts

  one, state, counts = run(tree)
  assert counts == [16, 16, 9, 9, 8, 8]
  assert (one["objective"]["kernel"] != 0).all()

  def last(w):
    return NamedSharding(
      mesh, PartitionSpec(*[None] * (w.ndim - 1), "data" if w.shape[-1] % 8 == 0 else None)
    )

  many, many_state, _ = run(jax.device_put(tree, jax.tree.map(last, tree)))
  for a, b in zip(
    jax.tree.leaves((one, state.masks)), jax.tree.leaves((many, many_state.masks)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_channel_is_dead_if_all_that_writes_it_is_zero():
  params = {
    "kernel": jnp.asarray([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]),
    "bias": jnp.asarray([0.0, -2.0, 0.0]),
  }
  group = Group((("kernel", 1), ("bias", 0)), ())
  np.testing.assert_array_equal(alive(params, {"g": group})["g"], [False, True, True])


def test_a_group_without_living_channels_keeps_one(rng):
  model, variables = network("mlp", rng)
  params = variables.params
  params["hidden"][0] = jax.tree.map(jnp.zeros_like, params["hidden"][0])
  small = shrink(variables, groups_of(params))
  assert small.params["hidden"][0]["kernel"].shape == (64, 1)
  batch = {"image": jnp.ones((2, 64))}
  large, new = (
    model.apply(*v, batch, train=False, key=None)[0]["logits"] for v in (variables, small)
  )
  np.testing.assert_allclose(new, large, atol=1e-6)


def test_what_cannot_be_is_refused(rng):
  _, variables = network("mlp", rng)
  params, groups = variables.params, groups_of(variables.params)
  with pytest.raises(ValueError, match=r"sparsity: expected a share in \[0, 1\), got 1"):
    prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=1)
  with pytest.raises(ValueError, match="distribution: expected one of"):
    prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=0.5, distribution="erk")
  with pytest.raises(ValueError, match="no batch norm writes the group"):
    pruned(params, groups, sparsity=0.5, score=channels.scale)
  with pytest.raises(
    ValueError, match="there is no 'student/hidden/0/kernel'; did you mean 'hidden/0/kernel'"
  ):
    pruned(params, under("student", groups), sparsity=0.5)
  with pytest.raises(ValueError, match="knows MLP, CNN, VGG, ResNet, Decoder and ViT"):
    groups_of({"a": jnp.ones(2)})
  with pytest.raises(ValueError, match="knows MLP, CNN, VGG, ResNet, Decoder and ViT"):
    groups_of(
      from_nnx(lambda rngs: WideResNet(1, 10, 1, 10, rngs=rngs)).init(jax.random.key(0), {}).params
    )
  wrong = {"g": Group((("hidden/0/kernel", -1),), (("head/kernel", 0),))}
  with pytest.raises(ValueError, match="'hidden/0/kernel, axis -1': 16, 'head/kernel, axis 0': 12"):
    shrink(variables, wrong)
  with pytest.raises(ValueError, match=r"hidden/0/bias \[16\] has no axis 1"):
    shrink(variables, {"g": Group((("hidden/0/bias", 1),), ())})
  with pytest.raises(ValueError, match="at least one"):
    shrink(variables, {})
  with pytest.raises(ValueError, match="there is no 'norm/mean'"):
    shrink(variables, {"g": Group((("hidden/0/bias", 0),), (), (("norm/mean", 0),))})
  statistics = Variables(params, {"mean": jnp.ones(15)})
  with pytest.raises(ValueError, match=r"expected 16 channels along axis 0 of mean \[15\]"):
    shrink(statistics, {"g": Group((("hidden/0/bias", 0),), (), (("mean", 0),))})
