"""A fingerprint depends on every bit, name, shape and dtype, not on order or sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.storage.fingerprint import checksums, fingerprint


def tree():
  return {
    "b": {"kernel": np.arange(64, dtype=np.float32).reshape(16, 4), "count": np.int32(3)},
    "a": [np.ones(3, np.float16), jnp.ones(5, jnp.bfloat16), np.array([True, False])],
    "key": jax.random.key(1),
  }


def test_fingerprint_ignores_key_order_and_sharding(mesh):
  expected = fingerprint(tree())
  reordered = dict(reversed(list(tree().items())))
  reordered["b"] = dict(reversed(list(reordered["b"].items())))
  assert fingerprint(reordered) == expected
  sharded = tree()
  sharded["b"]["kernel"] = jax.device_put(
    sharded["b"]["kernel"], NamedSharding(mesh, PartitionSpec("data"))
  )
  assert fingerprint(sharded) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.uint8])
def test_every_flipped_bit_changes_the_checksum(dtype, rng):
  array = rng.integers(0, 255, 5 * np.dtype(dtype).itemsize, dtype=np.uint8)
  original = checksums({"x": array.view(dtype)})
  for bit in range(array.size * 8):
    flipped = array.copy()
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert checksums({"x": flipped.view(dtype)}) != original


def test_exchanged_and_negated_values_change_the_checksum():
  arrays = ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [-1.0, -2.0, 3.0], [1.0, 3.0, 2.0])
  sums = {checksums({"x": np.array(array, np.float32)})["x"] for array in arrays}
  assert len(sums) == len(arrays)


def test_names_shapes_and_dtypes_change_the_fingerprint():
  x = np.zeros(4, np.float32)
  fingerprints = {
    fingerprint(t)
    for t in ({"x": x}, {"y": x}, {"x": x.reshape(2, 2)}, {"x": x.astype(np.int32)}, {"x": -x})
  }
  assert len(fingerprints) == 5


def test_last_bit_of_float64_changes_the_fingerprint():
  with jax.enable_x64(True):
    assert fingerprint({"x": np.float64(1)}) != fingerprint({"x": np.nextafter(np.float64(1), 2)})
