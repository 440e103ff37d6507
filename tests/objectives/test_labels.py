"""The labels term: cross entropy, regression and multi-label against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from terms_by_hand import KEY, evaluate, normal, shaped, softmax64

from distill_jax import reduce
from distill_jax.objectives import labels


@pytest.mark.parametrize(("smoothing", "shape"), [(0.0, (6,)), (0.2, (4, 3))])
def test_cross_entropy_equals_numpy_and_optax(rng, smoothing, shape):
  z = 5 * normal(rng, *shape, 7)
  y = rng.integers(0, 7, shape).astype(np.int32)
  target = (1 - smoothing) * np.eye(7)[y] + smoothing / 7
  expected = -(target * np.log(softmax64(z))).sum(-1)
  (values, _), mean = evaluate(labels(label_smoothing=smoothing), {"logits": z}, {}, {"label": y})
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
  smooth = optax.smooth_labels(jax.nn.one_hot(y, 7), smoothing)
  np.testing.assert_allclose(values, optax.softmax_cross_entropy(z, smooth), rtol=1e-5)


def test_rows_of_probabilities_are_labels(rng):
  z = normal(rng, 5, 4)
  p = softmax64(normal(rng, 5, 4)).astype(np.float32)
  p[3] = 0  # unlabeled
  _, mean = evaluate(labels(label_smoothing=0.1), {"logits": z}, {}, {"label": p})
  expected = -((0.9 * p + 0.1 / 4) * np.log(softmax64(z))).sum(-1)[[0, 1, 2, 4]].mean()
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_labeled_and_valid_rows_count(rng):
  z = normal(rng, 6, 4)
  y = np.array([0, 1, -1, 3, 2, -100], np.int32)
  where = np.array([1, 0, 1, 1, 1, 1], bool)
  each = -np.log(softmax64(z))[np.arange(6), y.clip(0)]
  (_, counted), mean = evaluate(labels(), {"logits": z}, {}, {"label": y, "where": where})
  np.testing.assert_array_equal(counted, [1, 0, 0, 1, 1, 0])
  np.testing.assert_allclose(mean, each[[0, 3, 4]].mean(), rtol=1e-5)
  _, mean = evaluate(labels(), {"logits": z}, {}, {"label": y})
  np.testing.assert_allclose(mean, each[[0, 1, 3, 4]].mean(), rtol=1e-5)
  _, mean = evaluate(labels(), {"logits": z}, {}, {"label": np.full(6, -1)})
  assert mean == 0


@pytest.mark.parametrize("shape", [(6,), (6, 3)])
def test_labels_of_generated_rows_do_not_count(rng, shape):
  z = normal(rng, *shape, 4)
  y = rng.integers(0, 4, shape).astype(np.int32)
  batch = {"label": y, "where": np.arange(6) != 5, "generated": np.arange(6) % 3 == 1}
  _, mean = evaluate(labels(), {"logits": z}, {}, batch)
  rows = [0, 2, 3]
  expected = -np.log(np.take_along_axis(softmax64(z[rows]), y[rows][..., None], -1)).mean()
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_missing_classes_stay_finite(rng, smoothing):
  z = normal(rng, 4, 5)
  y = np.array([0, 1, 2, 0], np.int32)
  z[:, 3:] = -np.inf
  term = labels(label_smoothing=smoothing)

  @jax.jit
  def mean(z):
    return evaluate(term, {"logits": z}, {}, {"label": y})[1]

  value, gradient = jax.value_and_grad(mean)(z)
  np.testing.assert_allclose(value, mean(z[:, :3]), rtol=1e-6)
  assert np.isfinite(gradient).all() and (gradient[:, 3:] == 0).all()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range_raises(smoothing):
  with pytest.raises(ValueError, match="label_smoothing"):
    labels(label_smoothing=smoothing)


@pytest.mark.parametrize(
  ("label", "shapes"),
  [
    (np.zeros(6, np.float32), r"float32 \(6,\)"),
    (np.zeros((6, 5), np.float32), r"\(6, 4\).*\(6, 5\)"),
    (np.zeros(5, np.int32), r"\(6, 4\).*\(5,\)"),
    (np.zeros((6, 4), np.int32), r"\(6,\).*\(6, 4\)"),
    (None, "image"),
  ],
)
def test_labels_that_do_not_fit_raise(rng, label, shapes):
  batch = {"image": 0} if label is None else {"label": label}
  with pytest.raises(ValueError, match=f"^label: .*{shapes}"):
    evaluate(labels(), {"logits": normal(rng, 6, 4)}, {}, batch)


def test_another_output_can_be_labeled(rng):
  z = normal(rng, 3, 4)
  y = np.arange(3)
  _, mean = evaluate(labels(output="aux"), {"aux": z, "logits": 0 * z}, {}, {"label": y})
  np.testing.assert_allclose(mean, -np.log(softmax64(z))[y, y].mean(), rtol=1e-5)
  with pytest.raises(ValueError, match="auxx.*'aux'"):
    labels(output="auxx").init(KEY, shaped(aux=(3, 4)), {})


# labels with a loss


def binary64(z, y):
  """-y log p - (1 - y) log(1 - p) of p = sigmoid(z), in float64."""
  z, y = np.float64(z), np.float64(y)
  return y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)


LOSSES = {  # the loss, its values and its derivative in float64
  "squared": (optax.squared_error, lambda z, y: (z - y) ** 2, lambda z, y: 2 * (z - y)),
  "binary": (optax.sigmoid_binary_cross_entropy, binary64, lambda z, y: 1 / (1 + np.exp(-z)) - y),
}


@pytest.mark.parametrize(
  ("name", "output_shape", "label_shape"),
  [
    ("squared", (6,), (6,)),
    ("squared", (6, 1), (6,)),
    ("squared", (6, 3, 2), (6, 3, 2)),
    ("binary", (6, 4), (6, 4)),
  ],
)
def test_loss_equals_numpy_where_rows_count(rng, name, output_shape, label_shape):
  loss, loss64, slope64 = LOSSES[name]
  z = normal(rng, *output_shape)
  y = normal(rng, *label_shape)
  if name == "binary":
    y = (y > 0).astype(np.float32)
  y.reshape(6, -1)[2, -1] = np.nan  # one of a row's labels
  where = np.array([1, 1, 1, 0, 1, 1], bool)
  z[3] = np.nan
  counted = [0, 1, 4, 5]
  batch = {"label": y, "where": where}

  @jax.jit
  def mean(z):
    value = labels(loss).apply({}, {}, {"logits": z}, {}, batch, step=0, key=KEY)[0]
    return reduce.mean(*value), value

  (value, (values, rows)), gradient = jax.value_and_grad(mean, has_aux=True)(z)
  np.testing.assert_array_equal(np.flatnonzero(rows), counted)
  z64 = np.float64(z).reshape(6, -1)[counted]
  y64 = np.float64(y).reshape(6, -1)[counted]
  expected = loss64(z64, y64)
  assert values.shape == (6,) and values.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(values)[counted], expected.mean(1), rtol=1e-5)
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
  slope = np.zeros((6, y64.shape[1]))
  slope[counted] = slope64(z64, y64) / y64.size
  np.testing.assert_allclose(gradient.reshape(6, -1), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_bfloat16_output_and_integer_label_become_float32(rng, dtype):
  z = jnp.asarray(normal(rng, 5, 3), jnp.bfloat16)
  y = rng.integers(0, 2, (5, 3)).astype(dtype)
  term = labels(optax.sigmoid_binary_cross_entropy, output="tags")
  (values, where), _ = evaluate(term, {"tags": z}, {}, {"label": y})
  assert values.dtype == jnp.float32 and np.all(where)
  np.testing.assert_allclose(values, binary64(z, y).mean(1), rtol=1e-5)


def test_loss_may_return_one_value_a_row(rng):
  z, y = normal(rng, 2, 5, 3)
  batch = {"label": y, "generated": np.arange(5) == 1}
  (values, where), _ = evaluate(labels(optax.cosine_distance), {"logits": z}, {}, batch)
  norms = np.linalg.norm(np.float64(z), axis=1) * np.linalg.norm(np.float64(y), axis=1)
  expected = 1 - (np.float64(z) * y).sum(1) / norms
  np.testing.assert_array_equal(where, np.arange(5) != 1)
  np.testing.assert_allclose(values[where], expected[where], rtol=1e-4)


@pytest.mark.parametrize(
  ("output_shape", "label_shape"),
  [
    ((6,), (6, 1)),
    ((6, 2), (6,)),
    ((6, 1), (6, 2)),
    ((6, 3), (6, 4)),
    ((6,), (5,)),
    ((6, 1), (5,)),
  ],
)
def test_label_of_another_shape_raises_with_both(rng, output_shape, label_shape):
  outputs = {"logits": normal(rng, *output_shape)}
  shapes = f"{output_shape}.*{label_shape}".replace("(", r"\(").replace(")", r"\)")
  with pytest.raises(ValueError, match=f"^label: .*{shapes}"):
    evaluate(labels(optax.squared_error), outputs, {}, {"label": normal(rng, *label_shape)})


def test_invalid_loss_raises(rng):
  z = {"logits": normal(rng, 4, 3)}
  batch = {"label": normal(rng, 4, 3)}
  with pytest.raises(ValueError, match="^loss: .*'mse'"):
    labels("mse")
  with pytest.raises(ValueError, match="^label_smoothing: .*0.1"):
    labels(optax.squared_error, label_smoothing=0.1)
  with pytest.raises(ValueError, match=r"^loss: .*\(\)"):
    evaluate(labels(lambda z, y: ((z - y) ** 2).mean()), z, {}, batch)
  with pytest.raises(ValueError, match=r"^where: .*\(4, 3\)"):
    evaluate(labels(optax.squared_error), z, {}, {**batch, "where": np.ones((4, 3), bool)})
