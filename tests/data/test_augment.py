import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import data


def a_batch(rng, n=16, size=6, channels=2, num_views=3):
  return {
    "image": rng.random((n, size, size, channels), np.float32),
    "id": rng.permutation(1000)[:n].astype(np.int32),
    "view": rng.integers(0, num_views, n).astype(np.int32),
    "label": rng.integers(0, 4, n).astype(np.int32),
  }


def rows(batch, index):
  return {name: values[index] for name, values in batch.items()}


def augmentation(seed=3):
  return data.augmentation(data.shift_crop(2), data.flip(), seed=seed)


JITTED = jax.jit(augmentation())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 15))
def test_view_is_independent_of_other_rows(row):
  index = np.array([row])
  batch = a_batch(np.random.default_rng(0))
  full = np.asarray(JITTED(batch)["image"])
  np.testing.assert_array_equal(JITTED(rows(batch, index))["image"], full[index])


def test_view_is_independent_of_device(rng, mesh):
  batch = a_batch(rng)
  sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  np.testing.assert_array_equal(JITTED(sharded)["image"], JITTED(batch)["image"])
  mapped = jax.pmap(augmentation())(jax.tree.map(lambda x: x.reshape((8, 2) + x.shape[1:]), batch))
  np.testing.assert_array_equal(
    mapped["image"].reshape(batch["image"].shape), JITTED(batch)["image"]
  )


def test_view_is_independent_of_jax_settings(rng):
  batch = a_batch(rng)
  expected = np.asarray(JITTED(batch)["image"])
  with jax.enable_x64(True):
    wide = batch | {"id": batch["id"].astype(np.int64), "view": batch["view"].astype(np.int64)}
    np.testing.assert_array_equal(jax.jit(augmentation())(wide)["image"], expected)
  with jax.default_prng_impl("rbg"):
    # A new function: jit would reuse the program of the old one, whatever the generator is now.
    np.testing.assert_array_equal(jax.jit(augmentation())(batch)["image"], expected)


@pytest.mark.parametrize("changed", ["id", "view", "seed"])
def test_id_view_and_seed_change_the_image(rng, changed):
  batch = a_batch(rng)
  if changed == "seed":
    other = jax.jit(augmentation(seed=4))(batch)
  else:
    other = JITTED(batch | {changed: batch[changed] + 1})
  same = (JITTED(batch)["image"] == other["image"]).all((1, 2, 3))
  # There are 50 possible views.
  assert same.sum() < 4


def test_only_the_image_changes(rng):
  batch = a_batch(rng)
  before = jax.tree.map(np.copy, batch)
  result = JITTED(batch)
  assert result.keys() == batch.keys()
  for name in ("id", "view", "label"):
    np.testing.assert_array_equal(result[name], batch[name])
  jax.tree.map(np.testing.assert_array_equal, batch, before)


def test_dtype_and_shape_stay(rng):
  dtype = np.uint8
  batch = a_batch(rng, size=5, channels=3)
  result = JITTED(batch | {"image": (batch["image"] * 255).astype(dtype)})["image"]
  assert result.dtype == dtype and result.shape == (16, 5, 5, 3)


def test_shift_crop_shifts_are_uniform(rng):
  n, padding, size = 1800, 1, 4
  image = rng.random((size, size, 1), np.float32) + 1
  batch = {"image": np.repeat(image[None], n, 0), "id": np.arange(n), "view": np.zeros(n, int)}
  result = np.asarray(jax.jit(data.augmentation(data.shift_crop(padding), seed=0))(batch)["image"])
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  crops = [padded[i : i + size, j : j + size] for i in range(3) for j in range(3)]
  counts = [(result == crop).all((1, 2, 3)).sum() for crop in crops]
  assert sum(counts) == n
  # chi-square, 8 degrees of freedom: p > 0.0007
  assert sum((c - 200) ** 2 / 200 for c in counts) < 27


def test_flip_mirrors_half_of_the_images(rng):
  batch = a_batch(rng, n=600)
  result = np.asarray(jax.jit(data.augmentation(data.flip(), seed=0))(batch)["image"])
  mirrored = (result == batch["image"][:, :, ::-1]).all((1, 2, 3))
  same = (result == batch["image"]).all((1, 2, 3))
  assert (mirrored ^ same).all() and 230 < mirrored.sum() < 370


def test_transforms_have_independent_keys(rng):
  """With one key for both, a shift to the left would always be mirrored, or never."""
  batch = a_batch(rng, n=400, size=4, channels=1) | {"image": np.ones((400, 4, 4, 1), np.float32)}
  twice = jax.jit(data.augmentation(data.shift_crop(1), data.shift_crop(1), seed=0))(batch)["image"]
  assert {float(x) for x in twice.sum((1, 2, 3))} >= {16.0, 12.0, 9.0, 8.0, 6.0, 4.0}


def test_no_transform_is_the_identity(rng):
  batch = a_batch(rng)
  assert data.augmentation(seed=0)(batch) is batch


@pytest.mark.parametrize("name", ["image", "id", "view"])
def test_missing_entry_raises(rng, name):
  batch = a_batch(rng)
  del batch[name]
  with pytest.raises(ValueError, match=f"^{name}:"):
    augmentation()(batch)


def test_arguments_out_of_range_raise(rng):
  with pytest.raises(ValueError, match=r"^padding:"):
    data.shift_crop(-1)
  with pytest.raises(ValueError, match=r"^padding:"):
    data.augmentation(data.shift_crop(6), seed=0)(a_batch(rng))
  with pytest.raises(ValueError, match=r"^seed:"):
    data.augmentation(seed=-1)


def test_views_match_golden_values():
  """Other shifts would pair cached teacher outputs with views that the student never sees."""
  image = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1) + 1
  batch = {
    "image": np.repeat(image, 6, 0),
    "id": np.array([0, 1, 2, 0, 0, 9]),
    "view": np.array([0, 0, 0, 1, 2, 5]),
  }
  centers = JITTED(batch)["image"][:, 2, 2, 0]
  assert centers.tolist() == [3.0, 13.0, 24.0, 19.0, 6.0, 1.0]
