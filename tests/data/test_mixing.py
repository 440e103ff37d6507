import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from distill_jax import data

CLASSES = 4
MIXERS = {"mixup": jax.jit(data.mixup(0.4, CLASSES)), "cutmix": jax.jit(data.cutmix(1.0, CLASSES))}
both = pytest.mark.parametrize("name", MIXERS)


def a_batch(rng, n=8, size=9):
  return {
    "image": rng.random((n, size, size, 2), np.float32),
    "label": rng.integers(0, CLASSES, n).astype(np.int32),
    "id": np.arange(n, dtype=np.int32),
    "view": np.zeros(n, np.int32),
    "where": np.ones(n, bool),
  }


def one_hot(labels):
  return np.where(np.asarray(labels)[:, None] >= 0, np.eye(CLASSES)[labels], 0)


def weight_of(mixed, batch):
  """Returns the weight of a row's image, read off a row whose label differs from its partner's."""
  row = np.flatnonzero(batch["label"] != np.roll(batch["label"], 1))[0]
  return float(mixed["label"][row, batch["label"][row]])


@both
def test_labels_are_mixed_with_the_row_before(rng, name):
  batch = a_batch(rng)
  mixed = MIXERS[name](jax.random.key(1), batch)
  w = weight_of(mixed, batch)
  expected = w * one_hot(batch["label"]) + (1 - w) * one_hot(np.roll(batch["label"], 1))
  np.testing.assert_allclose(mixed["label"], expected, atol=1e-6)
  np.testing.assert_allclose(mixed["label"].sum(1), 1, atol=1e-6)
  np.testing.assert_array_equal(mixed["id"], batch["id"])
  np.testing.assert_array_equal(mixed["view"], batch["view"])
  assert mixed["image"].dtype == np.float32


def test_mixup_blends_images_by_the_label_weight(rng):
  batch = a_batch(rng)
  mixed = MIXERS["mixup"](jax.random.key(1), batch)
  w = weight_of(mixed, batch)
  image = batch["image"].astype(np.float64)
  np.testing.assert_allclose(mixed["image"], w * image + (1 - w) * np.roll(image, 1, 0), atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_a_rectangle_of_the_label_weight(rng, seed):
  batch = a_batch(rng)
  mixed = MIXERS["cutmix"](jax.random.key(seed), batch)
  pasted = (np.asarray(mixed["image"]) == np.roll(batch["image"], 1, 0)).all(-1)
  unchanged = (np.asarray(mixed["image"]) == batch["image"]).all(-1)
  assert (pasted ^ unchanged).all() and (pasted == pasted[0]).all()
  rows, columns = pasted[0].any(1), pasted[0].any(0)
  np.testing.assert_array_equal(pasted[0], rows[:, None] & columns)
  # Each side is one interval.
  for line in (rows, columns):
    assert np.abs(np.diff(line.astype(int))).sum() <= 2
  np.testing.assert_allclose(weight_of(mixed, batch), 1 - pasted[0].mean(), atol=1e-6)


def test_mixup_weight_is_beta_distributed():
  alpha = 0.3
  batch = {"image": np.zeros((2, 1, 1, 1), np.float32), "label": np.array([0, 1])}
  keys = jax.random.split(jax.random.key(0), 500)
  mixed = jax.jit(jax.vmap(data.mixup(alpha, 2), (0, None)))(keys, batch)
  assert stats.kstest(mixed["label"][:, 0, 0], stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_area_matches_the_authors_code():
  """The expected areas are those of the authors' rand_bbox."""
  size, n = 12, 4000
  rng = np.random.default_rng(1)
  areas = []
  for _ in range(n):
    side = int(size * np.sqrt(1 - rng.beta(1, 1)))
    center = rng.integers(size, size=2)
    low, high = np.clip(center - side // 2, 0, size), np.clip(center + side // 2, 0, size)
    areas.append((high - low).prod())
  batch = {"image": np.zeros((2, size, size, 1), np.float32), "label": np.array([0, 1])}
  keys = jax.random.split(jax.random.key(0), n)
  mixed = jax.jit(jax.vmap(data.cutmix(1.0, 2), (0, None)))(keys, batch)
  ours = np.rint(np.asarray(mixed["label"][:, 0, 1]) * size**2)
  assert stats.ks_2samp(areas, ours).pvalue > 1e-3


@both
def test_unlabeled_example_adds_no_mass(rng, name):
  batch = a_batch(rng) | {"label": np.array([0, -1, -1, 2, 3, 1, -1, 1], np.int32)}
  mixed = MIXERS[name](jax.random.key(1), batch)
  # The partner of the first row, the last one, is of class 1.
  w = float(mixed["label"][0, 0])
  np.testing.assert_allclose(mixed["label"].sum(1), [1, 1 - w, 0, w, 1, 1, 1 - w, w], atol=1e-6)
  assert 0 < w < 1


def test_rows_of_probabilities_mix_as_labels_do(rng):
  name, batch = "mixup", a_batch(rng)
  soft = batch | {"label": one_hot(batch["label"]).astype(np.float32)}
  key = jax.random.key(1)
  np.testing.assert_array_equal(MIXERS[name](key, soft)["label"], MIXERS[name](key, batch)["label"])


@both
def test_row_left_out_is_no_partner(rng, name):
  batch = a_batch(rng) | {"where": np.array([1, 1, 0, 1, 1, 1, 0, 0], bool)}
  batch["image"][~batch["where"]] = np.nan
  mixed = MIXERS[name](jax.random.key(1), batch)
  np.testing.assert_array_equal(mixed["where"], batch["where"])
  assert np.isfinite(mixed["image"][batch["where"]]).all()
  # The row before is left out, so nothing is mixed in.
  for row in (0, 3):
    np.testing.assert_allclose(mixed["image"][row], batch["image"][row], rtol=1e-6)
    np.testing.assert_allclose(mixed["label"][row], one_hot(batch["label"])[row], rtol=1e-6)


def test_mixing_depends_on_the_key_not_on_devices(rng, mesh):
  batch, mix = a_batch(rng), MIXERS["cutmix"]
  sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  one, other = mix(jax.random.key(1), batch), mix(jax.random.key(2), batch)
  jax.tree.map(np.testing.assert_array_equal, mix(jax.random.key(1), sharded), one)
  assert weight_of(one, batch) != weight_of(other, batch)


@both
def test_batches_that_cannot_be_mixed_raise(rng, name):
  batch, key = a_batch(rng), jax.random.key(0)
  with pytest.raises(ValueError, match=r"^teacher/logits:"):
    MIXERS[name](key, batch | {"teacher/logits": np.zeros((8, 4))})
  with pytest.raises(ValueError, match=r"^label:"):
    MIXERS[name](key, batch | {"label": np.zeros((8, 3), np.float32)})
  with pytest.raises(ValueError, match=r"^label:"):
    MIXERS[name](key, batch | {"label": jnp.zeros(8)})
  del batch["label"]
  with pytest.raises(ValueError, match=r"^label:"):
    MIXERS[name](key, batch)


@pytest.mark.parametrize("mixer", [data.mixup, data.cutmix])
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_out_of_range_raises(mixer, alpha):
  with pytest.raises(ValueError, match=r"^alpha:"):
    mixer(alpha, 10)


def test_classes_out_of_range_raise():
  for classes in (0, 1.5, {"label": 0}):
    with pytest.raises(ValueError, match=r"^classes:"):
      data.mixup(1.0, classes)


def test_mixup_blends_vectors():
  batch = {"image": jnp.eye(4), "label": jnp.arange(4) % CLASSES}
  mixed = MIXERS["mixup"](jax.random.key(0), batch)
  weight = np.diag(mixed["image"])
  expected = weight * np.eye(4) + (1 - weight) * np.roll(np.eye(4), 1, 0)
  np.testing.assert_allclose(mixed["image"], expected, rtol=1e-6)
