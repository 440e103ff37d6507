"""Meshes, the rules that place arrays on them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax.distributed import sharding
from distill_jax.types import Skips, TrainState, Variables


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_what_is_left_goes_to_the_axis_of_minus_one():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert dict(sharding.make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[4:])
  assert [d.id for d in mesh.devices.flat] == [4, 5, 6, 7]
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((3,), r"does not fit 8 devices.*must be 8; sizes that divide it: \[1, 2, 4, 8\]"),
    ((16,), "does not fit 8 devices"),
    ((2, 2, 1), "does not fit 8 devices"),
    ((-1, -1), "-1 at most once"),
    ((0,), "sizes >= 1"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(*sizes)


def test_foreign_meshes_are_refused():
  with pytest.raises(ValueError, match="expected the axes data, fsdp, tensor, got model"):
    sharding.check_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,)))
  with pytest.raises(ValueError, match="AxisType.Auto"):
    sharding.check_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,)))


def test_large_arrays_are_spread_over_fsdp_along_their_largest_axis_that_divides():
  mesh = sharding.make_mesh(2, 4)
  tree = {
    "wide": shape(256, 1024),
    "odd": shape(513, 512),
    "neither": shape(257, 257),
    "small": shape(256, 255),
    "stacked": shape(4, 3, 66_000),
  }
  assert sharding.specs(tree, mesh) == {
    "wide": P(None, "fsdp"),
    "odd": P(None, "fsdp"),
    "neither": P(),
    "small": P(),
    "stacked": P(None, None, "fsdp"),
  }
  assert set(sharding.specs(tree, sharding.make_mesh()).values()) == {P()}


def test_the_first_rule_that_fits_places_and_moments_follow_their_parameter():
  mesh = sharding.make_mesh(2, 2, 2)
  params = {
    "student": {
      "mlp": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
      "head": jnp.ones((300, 300)),
    },
    "objective": {},
  }
  zero = jnp.zeros((), jnp.int32)
  optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3), optax.trace(0.9))
  state = TrainState(
    zero,
    jax.random.key(0),
    params,
    {"student": {}, "objective": {}},
    optimizer.init(params),
    (),
    Skips(zero, zero, zero),
  )
  rules = [("mlp/kernel$", P("fsdp", "tensor")), ("mlp", P("tensor"))]
  specs = sharding.state_specs(state, mesh, rules)
  expected = {
    "student": {"mlp": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "head": P("fsdp")},
    "objective": {},
  }
  adam, trace = specs.opt_state[1][0], specs.opt_state[2]
  assert specs.params == adam.mu == adam.nu == trace.trace == expected
  assert adam.count == specs.key == specs.step == P()


def test_what_an_optimizer_keeps_in_another_shape_is_placed_by_default():
  params = {"student": {"kernel": jnp.ones((256, 512))}}
  optimizer = optax.adafactor(1e-3)
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(
    zero, jax.random.key(0), params, {}, optimizer.init(params), (), Skips(zero, zero, zero)
  )
  specs = sharding.state_specs(state, sharding.make_mesh(2, 4), [("kernel", P("fsdp", None))])
  assert specs.params["student"]["kernel"] == P("fsdp", None)
  factors = [
    (leaf.shape, spec)
    for leaf, spec in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(specs.opt_state))
  ]
  assert {spec for size, spec in factors if size in ((256,), (512,))} == {P()}


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    (
      ("kernel", P("fsdp")),
      r"kernel \[10, 512\].*axis 0, of 10, does not divide into 4; nearest sizes: 8 or 12",
    ),
    (("kernel", P(("data", "fsdp"))), "does not divide into 8"),
    (("kernel", P("model")), "the mesh has the axes data, fsdp, tensor, and no 'model'"),
    (("bias", P("fsdp")), "fits no array; some are kernel"),
    (("kernel", P(None, None, "fsdp")), "3 axes or more"),
    (("kernel", P("fsdp", "fsdp")), "uses an axis of the mesh twice"),
    (("kernel(", P("fsdp")), "no regular expression"),
    (("kernel", "fsdp"), r"expected pairs \(pattern, PartitionSpec\), got \('kernel', 'fsdp'\)"),
  ],
)
def test_rules_that_do_not_fit_are_refused(rule, message):
  with pytest.raises(ValueError, match=message):
    sharding.specs({"kernel": shape(10, 512)}, sharding.make_mesh(2, 4), [rule])


def test_a_moving_average_lies_as_its_parameter_does_and_moments_have_no_rules_of_their_own():
  params, zero = {"student": {"up": jnp.ones((8, 6))}, "objective": {}}, jnp.zeros((), jnp.int32)
  average = Variables({"up": jnp.ones((8, 6))}, {})
  optimizer = optax.adam(1e-3)
  parts = (params, {}, optimizer.init(params), average, Skips(zero, zero, zero))
  state = TrainState(zero, jax.random.key(0), *parts)
  specs = sharding.state_specs(
    state, sharding.make_mesh(2, 2, 2), [("params/student/up$", P(None, "tensor"))]
  )
  assert specs.average.params["up"] == specs.params["student"]["up"] == P(None, "tensor")
  with pytest.raises(ValueError, match="fits no array"):
    sharding.state_specs(state, sharding.make_mesh(2, 2, 2), [("opt_state/0/mu/", P("fsdp"))])


def test_a_rule_for_everything_leaves_numbers_alone():
  tree = {"step": jnp.zeros(()), "kernel": shape(8, 8), "rate": 0.5}
  specs = sharding.specs(tree, sharding.make_mesh(2, 4), [(".*", P("fsdp"))])
  assert specs == {"step": P(), "kernel": P("fsdp"), "rate": P()}


def test_rows_lie_over_data_and_fsdp():
  mesh = sharding.make_mesh(2, 2, 2)
  rows = jax.device_put(jnp.arange(8), sharding.row_sharding(mesh))
  assert sorted(s.data.tolist() for s in rows.addressable_shards) == sorted(
    [[0, 1], [2, 3], [4, 5], [6, 7]] * 2
  )
  assert sharding.local_rows(mesh, 8).tolist() == list(range(8))
  with pytest.raises(
    ValueError, match="batch_size 6 does not divide over 4 devices x 1 .*nearest: 4 or 8"
  ):
    sharding.check_divisible(6, mesh)


def test_a_placed_copy_survives_the_donation_of_the_copy():
  mesh = sharding.make_mesh()
  mine = {"a": jnp.arange(8.0), "key": jax.random.key(0)}
  placed = sharding.place(mine, mesh, {"a": P("data"), "key": P()})
  assert placed["a"].sharding == NamedSharding(mesh, P("data"))
  jax.jit(lambda t: t["a"] + 1, donate_argnums=0)(placed)
  np.testing.assert_array_equal(mine["a"], np.arange(8))
