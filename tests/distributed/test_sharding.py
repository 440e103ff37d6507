"""Meshes and the placement of arrays and batches on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax.distributed import sharding


def test_minus_one_is_the_number_of_devices_left():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert dict(sharding.make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[4:])
  assert [d.id for d in mesh.devices.flat] == [4, 5, 6, 7]
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3,), (16,), (2, 2, 1), (-1, -1), (0,), (3, -1)])
def test_sizes_that_do_not_fit_raise(sizes):
  with pytest.raises(ValueError, match=r"^mesh: "):
    sharding.make_mesh(*sizes)


def test_error_lists_the_sizes_that_fit():
  with pytest.raises(ValueError, match=r"mesh: .*8.*\[1, 2, 4, 8\]"):
    sharding.make_mesh(3)


def test_meshes_of_other_axes_raise():
  with pytest.raises(ValueError, match=r"mesh: .*model"):
    sharding.check_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,)))
  with pytest.raises(ValueError, match=r"mesh: .*AxisType.Auto"):
    sharding.check_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,)))
  sharding.check_mesh(sharding.make_mesh(2, 2, 2))


@pytest.mark.parametrize(
  "check", [lambda: sharding.check_mesh(sharding.make_mesh()), sharding.data_mesh]
)
def test_explicit_mesh_that_is_set_raises(check):
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
    with pytest.raises(ValueError, match="^mesh: .*Explicit.*jax.set_mesh"):
      check()


def test_set_mesh_must_be_the_runs():
  with jax.set_mesh(sharding.make_mesh(4, 2)):
    sharding.check_mesh(sharding.make_mesh(4, 2))
    with pytest.raises(ValueError, match="^mesh: .*jax.set_mesh.*'data': 8"):
      sharding.check_mesh(sharding.make_mesh())


def test_data_mesh_takes_the_first_devices():
  assert dict(sharding.data_mesh().shape) == {"data": 8}
  assert [d.id for d in sharding.data_mesh(3).devices.flat] == [0, 1, 2]
  for devices in (0, 9):
    with pytest.raises(ValueError, match=rf"devices: .*{devices}$"):
      sharding.data_mesh(devices)


def test_rows_are_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(2, 2, 2)
  rows = jax.device_put(jnp.arange(8), sharding.row_sharding(mesh))
  shards = sorted(shard.data.tolist() for shard in rows.addressable_shards)
  assert shards == sorted([[0, 1], [2, 3], [4, 5], [6, 7]] * 2)
  assert sharding.local_rows(mesh, 8).tolist() == list(range(8))
  placed = sharding.place_rows({"x": np.arange(8)}, mesh, 8)["x"]
  assert placed.sharding == sharding.row_sharding(mesh)


def test_batch_must_divide_over_devices_and_microbatches():
  mesh = sharding.make_mesh(2, 2, 2)
  sharding.check_divisible(8, mesh, microbatches=2)
  with pytest.raises(ValueError, match=r"batch_size: .*4 or 8$"):
    sharding.check_divisible(6, mesh)
  with pytest.raises(ValueError, match=r"batch_size: .*8 or 16$"):
    sharding.check_divisible(12, mesh, microbatches=2)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("source", ["numpy", "one", "replicated", "rows"])
def test_caller_keeps_arrays_when_the_placed_copy_is_donated(devices, source):
  mesh = sharding.data_mesh(devices)
  everywhere = sharding.data_mesh()
  arrays = {"a": jnp.arange(8.0), "b": jnp.arange(8.0), "key": jax.random.key(0)}
  if source == "numpy":
    arrays = {**arrays, "a": np.arange(8.0), "b": np.arange(8.0)}
  elif source != "one":
    spec = P() if source == "replicated" else P("data")
    arrays = {
      name: jax.device_put(x, NamedSharding(everywhere, P() if x.ndim == 0 else spec))
      for name, x in arrays.items()
    }
  specs = {"a": P("data"), "b": P(), "key": P()}
  placed = sharding.place(arrays, mesh, specs)
  for name, spec in specs.items():
    assert placed[name].sharding == NamedSharding(mesh, spec)
  jax.jit(lambda tree: {**tree, "a": tree["a"] + 1, "b": tree["b"] + 1}, donate_argnums=0)(placed)
  for name in ("a", "b"):
    np.testing.assert_array_equal(arrays[name], np.arange(8))
  assert jax.random.key_data(arrays["key"]).tolist() == [0, 0]


def test_replicate_copies_to_every_device():
  mesh = sharding.make_mesh()
  placed = sharding.replicate({"a": jnp.arange(8.0)}, mesh)
  assert placed["a"].sharding == sharding.replicated_sharding(mesh)
