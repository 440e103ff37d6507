import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.sizes import Layer, disk_bytes, layer_zeros
from distill_jax.storage.student import export_student
from distill_jax.types import Variables


@pytest.fixture
def params(rng):
  kernel = rng.normal(size=(64, 32)) * (rng.random((64, 32)) < 0.25)
  return {
    "a": {"kernel": jnp.asarray(kernel, jnp.float32)},
    "b": [jnp.zeros(3, jnp.bfloat16), jnp.ones(0)],
  }


def test_zeros_are_counted_by_layer(params, mesh):
  zeros = int((np.asarray(params["a"]["kernel"]) == 0).sum())
  expected = [Layer("a/kernel", 2048, zeros), Layer("b/0", 3, 3), Layer("b/1", 0, 0)]
  assert layer_zeros(params) == expected
  assert [layer.sparsity for layer in expected] == [zeros / 2048, 1.0, 0.0]
  placed = {
    "a": jax.device_put(params["a"], NamedSharding(mesh, PartitionSpec("data"))),
    "b": params["b"],
  }
  assert layer_zeros(placed) == expected


def test_bytes_match_the_exported_file(params, tmp_path):
  variables = Variables(params, {"mean": jnp.ones(4)})
  folder = export_student(variables, tmp_path, description={})
  data = (folder / "model.safetensors").read_bytes()
  disk = disk_bytes(variables)
  assert disk == disk_bytes(folder) == disk_bytes(str(folder / "model.safetensors"))
  assert disk.dense == len(data)
  # Only the headers of the two streams differ.
  assert abs(disk.compressed - len(gzip.compress(data, 6))) < 32
  assert disk.compressed < 0.5 * disk.dense
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="model.safetensors"):
    disk_bytes(tmp_path / "empty")
