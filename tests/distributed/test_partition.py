"""Rules and defaults that split the arrays of a tree and of a train state over a mesh."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax.distributed import partition, sharding
from distill_jax.types import Skips, TrainState, Variables


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def make_state(student, optimizer, average=()):
  """Returns shapes of a train state with these parameters."""

  def init():
    params = {"student": student, "objective": {}}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    zero = jnp.zeros((), jnp.int32)
    skips = Skips(zero, zero, zero)
    return TrainState(zero, jax.random.key(0), params, {}, optimizer.init(params), average, skips)

  return jax.eval_shape(init)


def test_large_arrays_are_split_along_their_largest_even_axis():
  mesh = sharding.make_mesh(2, 4)
  tree = {
    "wide": shape(256, 1024),
    "odd": shape(513, 512),
    "uneven": shape(257, 257),
    "stacked": shape(4, 3, 66_000),
  }
  assert partition.specs(tree, mesh) == {
    "wide": P(None, "fsdp"),
    "odd": P(None, "fsdp"),
    "uneven": P(),
    "stacked": P(None, None, "fsdp"),
  }
  assert set(partition.specs(tree, sharding.make_mesh()).values()) == {P()}


def test_arrays_are_split_from_the_minimum_size():
  tree = {
    "at": shape(4, partition.MIN_SIZE_TO_SHARD // 4),
    "below": shape(4, partition.MIN_SIZE_TO_SHARD // 4 - 4),
  }
  specs = partition.specs(tree, sharding.make_mesh(2, 4))
  assert specs == {"at": P(None, "fsdp"), "below": P()}


def test_first_matching_rule_applies_and_moments_follow():
  student = {"mlp": {"kernel": shape(8, 6), "bias": shape(6)}, "head": shape(300, 300)}
  optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3), optax.trace(0.9))
  rules = [("mlp/kernel$", P("fsdp", "tensor")), ("mlp", P("tensor"))]
  specs = partition.state_specs(make_state(student, optimizer), sharding.make_mesh(2, 2, 2), rules)
  expected = {
    "student": {"mlp": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "head": P("fsdp")},
    "objective": {},
  }
  adam, trace = specs.opt_state[1][0], specs.opt_state[2]
  assert specs.params == adam.mu == adam.nu == trace.trace == expected
  assert adam.count == specs.key == specs.step == P()


def test_optimizer_arrays_of_other_shapes_follow_the_default():
  state = make_state({"kernel": shape(256, 512)}, optax.adafactor(1e-3))
  specs = partition.state_specs(state, sharding.make_mesh(2, 4), [("kernel", P("fsdp", None))])
  assert specs.params["student"]["kernel"] == P("fsdp", None)
  factors = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(specs.opt_state))
  assert {spec for leaf, spec in factors if leaf.shape in ((256,), (512,))} == {P()}


def test_average_follows_its_parameter_and_rules_skip_moments():
  student = {"up": shape(8, 6)}
  average = Variables({"up": jnp.ones((8, 6))}, {})
  state = make_state(student, optax.adam(1e-3), average)
  mesh = sharding.make_mesh(2, 2, 2)
  specs = partition.state_specs(state, mesh, [("params/student/up$", P(None, "tensor"))])
  assert specs.average.params["up"] == specs.params["student"]["up"] == P(None, "tensor")
  with pytest.raises(ValueError, match=r"rules: .*opt_state"):
    partition.state_specs(state, mesh, [("opt_state/0/mu/", P("fsdp"))])


def test_average_of_another_shape_follows_the_rules():
  average = Variables({"up": jnp.ones((4, 6))}, {})
  state = make_state({"up": shape(8, 6)}, optax.sgd(1e-3), average)
  rules = [("params/student/up$", P("tensor")), ("average/params/up$", P(None, "tensor"))]
  specs = partition.state_specs(state, sharding.make_mesh(2, 2, 2), rules)
  assert specs.average.params["up"] == P(None, "tensor")


def test_rule_for_everything_skips_scalars():
  tree = {"step": jnp.zeros(()), "kernel": shape(8, 8), "rate": 0.5}
  specs = partition.specs(tree, sharding.make_mesh(2, 4), [(".*", P("fsdp"))])
  assert specs == {"step": P(), "kernel": P("fsdp"), "rate": P()}


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    (("kernel", P("fsdp")), r"kernel \[10, 512\].*8 or 12"),
    (("kernel", P(("data", "fsdp"))), r"kernel \[10, 512\].*8 or 16"),
    (("kernel", P("model")), "'model'"),
    (("bias", P("fsdp")), "'bias'.*kernel"),
    (("kernel", P(None, None, "fsdp")), r"kernel \[10, 512\]"),
    (("kernel", P("fsdp", "fsdp")), "fsdp"),
    (("kernel(", P("fsdp")), r"'kernel\('"),
    (("kernel", "fsdp"), r"\('kernel', 'fsdp'\)"),
  ],
)
def test_rules_that_do_not_fit_raise(rule, message):
  with pytest.raises(ValueError, match=rf"^rules: .*{message}"):
    partition.specs({"kernel": shape(10, 512)}, sharding.make_mesh(2, 4), [rule])
  with pytest.raises(ValueError, match=r"^rules: .*mapping"):
    partition.specs({"kernel": shape(8)}, sharding.make_mesh(2, 4), {"kernel": P("fsdp")})
