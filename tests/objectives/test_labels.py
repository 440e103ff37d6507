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
  term = labels(output="aux", entry="label")
  _, mean = evaluate(term, {"aux": z, "logits": 0 * z}, {}, {"label": y})
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
  (values, where), _ = evaluate(term, {"tags": z}, {}, {"tags": y})
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


# entries, ignore labels, weights


def apply(term, outputs, batch):
  """Returns a term's value outside of a compiled function, where labels can be read."""
  return term.apply({}, {}, outputs, {}, batch, step=jnp.int32(0), key=KEY)[0]


@pytest.mark.parametrize("output", ["logits", "0/logits", "type"])
def test_outputs_learn_the_entry_of_their_name(rng, output):
  z = normal(rng, 4, 3)
  batch = {"label": np.array([0, 1, 2, 0]), "type": np.array([2, 2, 1, 1])}
  y = batch["type" if output == "type" else "label"]
  _, mean = evaluate(labels(output=output), {output: z}, {}, batch)
  np.testing.assert_allclose(mean, -np.log(softmax64(z))[range(4), y].mean(), rtol=1e-5)
  if output == "type":
    with pytest.raises(ValueError, match="^entry: .*'type'"):
      apply(labels(output="type"), {"type": z}, {"label": y})
    with pytest.raises(ValueError, match="^kind: .*'type'|^kind: "):
      apply(labels(output="type", entry="kind"), {"type": z}, batch)


@pytest.mark.parametrize(("ignored", "dtype"), [(255, np.uint8), (-100, np.int16), (-1, np.int32)])
def test_ignore_label_of_any_value_is_unlabeled(ignored, dtype):
  z = {"logits": jnp.zeros((2, 2, 2, 3))}
  y = np.array([[[0, ignored], [ignored, 2]], [[1, ignored], [ignored, 0]]]).astype(dtype)
  term = labels(ignore_label=ignored)
  _, mean = evaluate(term, z, {}, {"label": y})
  np.testing.assert_allclose(mean, np.log(3), rtol=1e-6)
  np.testing.assert_allclose(reduce.mean(*apply(term, z, {"label": y})), np.log(3), rtol=1e-6)


@pytest.mark.parametrize("loss", [None, lambda z, y: (z**2).sum(-1)])
def test_label_that_is_no_class_raises_and_is_nan_when_compiled(rng, loss):
  outputs = {"logits": normal(rng, 4, 3)}
  batch = {"label": np.array([0, 1, 7, 2])}
  with pytest.raises(ValueError, match="^label: .*7.*ignore_label=7"):
    apply(labels(loss), outputs, batch)
  (values, _), mean = evaluate(labels(loss), outputs, {}, batch)
  np.testing.assert_array_equal(np.isnan(values), [0, 0, 1, 0])
  assert np.isnan(mean)
  padded = batch | {"where": np.array([1, 1, 0, 1], bool)}
  _, mean = evaluate(labels(loss), outputs, {}, padded)
  assert np.isfinite(mean)
  apply(labels(loss), outputs, padded)


def test_nan_of_masked_rows_reaches_no_gradient(rng):
  z = normal(rng, 4, 3)
  z[1], z[2] = np.nan, np.inf
  batch = {"label": np.array([0, -1, 255, 2])}
  term = labels(ignore_label=255)

  def mean(z):
    return reduce.mean(*apply(term, {"logits": z}, batch))

  value, gradient = jax.value_and_grad(mean)(jnp.asarray(z))
  rest = {"label": batch["label"][[0, 3]]}
  expected = reduce.mean(*apply(labels(), {"logits": z[[0, 3]]}, rest))
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert (gradient[1:3] == 0).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("soft", [False, True])
def test_class_and_example_weights_multiply_the_loss(rng, soft):
  z = normal(rng, 5, 3)
  target = softmax64(normal(rng, 5, 3)) if soft else np.eye(3)[[0, 2, 1, 2, 0]]
  label = target.astype(np.float32) if soft else target.argmax(-1)
  weights, examples = np.array([0.5, 2.0, 1.25]), np.array([1.0, 0.0, 3.0, 0.5, 1.0], np.float32)
  term = labels(class_weights=[0.5, 2, 1.25], example_weights="importance", label_smoothing=0.1)
  (values, _), mean = evaluate(term, {"logits": z}, {}, {"label": label, "importance": examples})
  smooth = 0.9 * target + 0.1 / 3
  expected = examples * -(weights * smooth * np.log(softmax64(z))).sum(-1)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)


def test_loss_of_class_numbers_gets_them_as_integers(rng):
  def focal(z, y):
    log_q = jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]
    return -((1 - jnp.exp(log_q)) ** 2) * log_q

  z = normal(rng, 3, 2, 4)
  y = np.array([[0, 3], [-1, 2], [1, 1]])
  q = np.take_along_axis(softmax64(z), y.clip(0)[..., None], -1)[..., 0]
  weights = np.array([1.0, 2.0, 3.0, 4.0])
  expected = (-((1 - q) ** 2) * np.log(q) * weights[y])[y >= 0].mean()
  _, mean = evaluate(labels(focal, class_weights=weights), {"logits": z}, {}, {"label": y})
  np.testing.assert_allclose(mean, expected, rtol=1e-5)
  with pytest.raises(ValueError, match=r"^loss: .*\(\)"):
    apply(labels(lambda z, y: focal(z, y).mean()), {"logits": z}, {"label": y})


def test_binary_focal_loss_of_optax(rng):
  z = normal(rng, 6, 1)
  y = np.array([0, 1, 1, 255, 0, 1])
  term = labels(optax.sigmoid_focal_loss, ignore_label=255)
  _, mean = evaluate(term, {"logits": z}, {}, {"label": y})
  p = 1 / (1 + np.exp(-np.float64(z[:, 0])))
  p = np.where(y == 1, p, 1 - p)
  expected = (-((1 - p) ** 2) * np.log(p))[y != 255].mean()
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_label_smoothing_may_be_a_schedule(rng):
  z, y = normal(rng, 4, 3), np.array([0, 1, 2, 0])
  schedule = optax.linear_schedule(0.2, 0.0, 10)
  values, _ = apply(labels(label_smoothing=schedule), {"logits": z}, {"label": y})
  expected, _ = apply(labels(label_smoothing=0.2), {"logits": z}, {"label": y})
  np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "weights", [[1.0], [-1.0, 1, 1], [0, 0, 0], [1, float("nan"), 1], "abc", [[1, 1, 1]], [True] * 3]
)
def test_class_weights_that_are_none_raise(weights):
  with pytest.raises(ValueError, match="^class_weights:"):
    labels(class_weights=weights)


def test_settings_that_do_not_fit_the_output_raise(rng):
  with pytest.raises(ValueError, match="^class_weights: .*3 .*'logits'.*2"):
    labels(class_weights=[1, 2]).init(KEY, shaped(logits=(4, 3)), {})
  with pytest.raises(ValueError, match="^logits: .*2 classes"):
    labels().init(KEY, shaped(logits=(4, 1)), {})
  z, y = {"logits": normal(rng, 4, 3)}, np.arange(4) % 3
  with pytest.raises(ValueError, match=r"^weight: .*\(4,\).*\(3,\)"):
    apply(labels(example_weights="weight"), z, {"label": y, "weight": np.ones(3)})
  with pytest.raises(ValueError, match="^weight: .*-1"):
    apply(labels(example_weights="weight"), z, {"label": y, "weight": np.array([1, -1, 1, 1.0])})
  with pytest.raises(ValueError, match="^wait: .*'weight'"):
    apply(labels(example_weights="wait"), z, {"label": y, "weight": np.ones(4)})
  with pytest.raises(ValueError, match="^class_weights: .*'label'"):
    one = {"logits": normal(rng, 4, 2)}
    apply(labels(optax.squared_error, class_weights=[1, 2]), one, {"label": normal(rng, 4, 2)})


@pytest.mark.parametrize(
  ("shape", "label", "hint"),
  [
    ((4, 4), np.eye(4, dtype=np.int32), r"argmax"),
    ((4, 3), np.ones((4, 3), np.int32), r"multi_label"),
    ((4, 3), np.ones((4, 1), np.int32), r"label\[\.\.\., 0\]"),
    ((2, 6, 5), np.ones((2, 4), np.int32), r"transcript"),
    ((2, 6, 6, 5), np.ones((2, 3, 3), np.int32), r"resize=True"),
    ((2, 6, 6, 5), np.ones((2, 3, 3), np.float32), r"int32"),
    ((2, 6, 6, 5), np.ones((2, 3), np.int32), r"transcript"),
    ((4, 3), np.ones(4, np.float32), r"int32"),
  ],
)
def test_labels_of_another_shape_say_what_to_write(shape, label, hint):
  with pytest.raises(ValueError, match=f"^label: .*{hint}"):
    apply(labels(), {"logits": jnp.zeros(shape)}, {"label": label})


def test_bool_labels_are_classes_0_and_1(rng):
  z, y = normal(rng, 4, 2), np.array([True, False, False, True])
  values, _ = apply(labels(), {"logits": z}, {"label": y})
  np.testing.assert_allclose(values, -np.log(softmax64(z))[range(4), y.astype(int)], rtol=1e-5)


def test_mixed_row_counts_by_its_sum_and_a_larger_sum_raises(rng):
  z = normal(rng, 2, 3)
  rows = np.array([[0.25, 0, 0], [0, 0.5, 0.5]], np.float32)
  smooth = 0.9 * rows + 0.1 / 3 * rows.sum(1, keepdims=True)
  expected = -(smooth * np.log(softmax64(z))).sum(-1)
  term = labels(label_smoothing=0.1)
  (values, _), _ = evaluate(term, {"logits": z}, {}, {"label": rows})
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  for wrong in (rows * 1.5, -rows):
    with pytest.raises(ValueError, match="^label: "):
      apply(term, {"logits": z}, {"label": wrong})
