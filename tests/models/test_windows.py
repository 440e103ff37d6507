"""Tests sliding windows: against a float64 NumPy blend, whole images, and where Models are used."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpolation import interpolate
from jax import export

from distill_jax import models, train
from distill_jax.models.windows import _starts

IMAGE = np.random.default_rng(0).normal(size=(2, 9, 7, 2)).astype(np.float32)


def pointwise(window, **options):
  model = models.from_apply(None, lambda w, x: jnp.tanh(x @ w), variables=jnp.eye(2) * 3)
  return models.sliding_window(model, window, **options)


def positional(window, **options):
  """Returns a model whose outputs depend on a pixel's place in the window."""
  ramp = 1 + np.arange(np.prod(window)).reshape(*window, 1)
  model = models.from_apply(None, lambda w, x: w * x * ramp[..., :1], variables=jnp.array(1.0))
  return models.sliding_window(model, window, **options), ramp


def apply(model, image, *, is_training=False):
  run = jax.jit(lambda *arguments: model.apply(*arguments, train=is_training, key=None)[0])
  return run(*model.variables, {"image": image})


def blend(image, ramp, starts, curve):
  """Returns the weighted mean of `image * ramp` over windows, one after another in float64."""
  window = ramp.shape[:-1]
  total, weight = np.zeros(image.shape), np.zeros(image.shape)
  for start in itertools.product(*starts):
    place = (slice(None), *(slice(a, a + size) for a, size in zip(start, window)))
    total[place] += image[place].astype(np.float64) * ramp * curve
    weight[place] += curve
  return total / weight


def gaussian(window):
  """Returns the density of a normal distribution at each pixel [*window, 1], up to a factor."""
  grids = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in window), indexing="ij")
  exponents = [(grid / (n / 8)) ** 2 / 2 for grid, n in zip(grids, window)]
  return np.exp(-sum(exponents))[..., None]


@pytest.mark.parametrize(
  "side, size, overlap, expected",
  [
    (9, 4, 0.5, [0, 2, 4, 5]),
    (8, 4, 0.5, [0, 2, 4]),
    (9, 4, 0.0, [0, 4, 5]),
    (4, 4, 0.5, [0]),
    (5, 4, 0.9, [0, 1]),
    (14, 10, 0.8, [0, 2, 4]),
  ],
)
def test_last_window_is_shifted_inward(side, size, overlap, expected):
  assert _starts(side, size, overlap).tolist() == expected


def test_gaussian_blend_of_images_equals_numpy():
  model, ramp = positional((4, 4))
  expected = blend(IMAGE, ramp, ([0, 2, 4, 5], [0, 2, 3]), gaussian((4, 4)))
  np.testing.assert_allclose(apply(model, IMAGE)["logits"], expected, rtol=2e-5)


def test_constant_blend_of_volumes_equals_numpy():
  volume = IMAGE.reshape(2, 3, 7, 6, 1)
  model, ramp = positional((2, 4, 5), overlap=0.25, weights="constant")
  expected = blend(volume, ramp, ([0, 1], [0, 3], [0, 1]), np.ones(1))
  np.testing.assert_allclose(apply(model, volume)["logits"], expected, rtol=2e-5)


@pytest.mark.parametrize(
  "window, options",
  [((3, 3), {"overlap": 0.7}), ((16, 4), {"weights": "constant"})],
)
def test_pointwise_network_gives_the_outputs_of_the_whole_image(window, options):
  logits = apply(pointwise(window, **options), IMAGE)["logits"]
  np.testing.assert_allclose(logits, np.tanh(IMAGE * 3), atol=1e-6)


def test_image_smaller_than_the_window_lies_in_its_middle():
  model, ramp = positional((12, 7))
  expected = IMAGE * ramp[1:10]  # One row of zeros before, two after.
  np.testing.assert_allclose(apply(model, IMAGE)["logits"], expected, rtol=1e-6)


def network_with_features(w, x):
  return {"logits": w * x, "half": x[:, ::2, ::2], "mean": x.mean((1, 2)), "first": x[..., 0]}


def features(window, **options):
  model = models.from_apply(None, network_with_features, variables=jnp.array(1.0))
  return models.sliding_window(model, window, **options)


def test_named_outputs_are_blended():
  outputs = apply(features((4, 4), outputs=("logits", "first")), IMAGE)
  assert set(outputs) == {"logits", "first"}
  np.testing.assert_allclose(outputs["first"], IMAGE[..., 0], rtol=1e-5)


def test_outputs_on_a_lower_grid_are_resized_in_each_window():
  model = features((4, 4), outputs=("half",), overlap=0.0)
  image = IMAGE[:, :8, :4]
  expected = [interpolate(x[:, ::2, ::2], (4, 4)) for x in (image[:, :4], image[:, 4:])]
  np.testing.assert_allclose(apply(model, image)["half"], np.concatenate(expected, 1), atol=1e-5)


@pytest.mark.parametrize("window, is_training", [((4, 4), True), ((9, 7), False)])
def test_training_and_images_of_the_window_get_all_outputs(window, is_training):
  outputs = apply(features(window), IMAGE, is_training=is_training)
  np.testing.assert_array_equal(outputs["half"], IMAGE[:, ::2, ::2])


def test_network_is_computed_for_one_window_of_each_image():
  shapes = []

  def network(w, x):
    shapes.append(x.shape)
    return w * x

  model = models.from_apply(None, network, variables=jnp.array(1.0))
  model = models.sliding_window(model, (4, 4))
  program = jax.make_jaxpr(
    lambda x: model.apply(*model.variables, {"image": x}, train=False, key=None)[0]
  )
  text = str(program(IMAGE))
  assert set(shapes) == {(2, 4, 4, 2)} and text.count("scan[") == 1


def test_program_takes_any_number_of_images():
  model = pointwise((4, 4))
  image = jax.ShapeDtypeStruct(export.symbolic_shape("rows, 9, 7, 2"), jnp.float32)
  logits = export.export(jax.jit(lambda image: apply(model, image)["logits"]))(image).out_avals[0]
  assert logits.shape == image.shape


def test_predict_takes_images_larger_than_the_window():
  images = np.concatenate([IMAGE] * 3)
  model = pointwise((4, 4))
  outputs = train.predict(model, None, {"image": images})
  np.testing.assert_allclose(outputs["logits"], np.tanh(images * 3), atol=1e-6)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: models.sliding_window(lambda x: x, (4, 4)), "model"),
    (lambda: pointwise(4), "window: .* got 4"),
    (lambda: pointwise((4, 0)), "window: .*>= 1, got 0"),
    (lambda: pointwise((4.0, 4)), "window: .*got 4.0: write 4"),
    (lambda: pointwise(()), r"window: .*\(\)"),
    (lambda: pointwise((4, 4), overlap=1), "overlap: .* got 1"),
    (lambda: pointwise((4, 4), overlap="half"), "overlap: .* 'half'"),
    (lambda: pointwise((4, 4), weights="hann"), "weights: .* 'hann'"),
    (lambda: pointwise((4, 4), outputs="logits"), r"outputs: .* write \('logits',\)"),
    (lambda: pointwise((4, 4), outputs=()), "outputs"),
    (lambda: apply(pointwise((4, 4), entry="volume"), IMAGE), r"entry: .*'volume'.*\['image'\]"),
    (lambda: apply(pointwise((2, 2, 2, 2)), IMAGE), r"window: .*'image'.*\(2, 9, 7, 2\)"),
    (lambda: apply(pointwise((4, 4)), IMAGE[None]), r"window: .*\(1, 2, 9, 7, 2\)"),
    (lambda: apply(features((4, 4), outputs=("logit",)), IMAGE), "outputs: .*'logit'.*'logits'"),
    (
      lambda: apply(features((4, 4), outputs=("mean",)), IMAGE),
      r"outputs: 'mean': .*\(2, 2\)",
    ),
  ],
)
def test_invalid_arguments_raise(call, words):
  with pytest.raises(ValueError, match=rf"^{words}"):
    call()
