"""Terms of label maps: what is ignored, weights of classes, and logits on other grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interpolation import interpolate
from terms_by_hand import KEY, evaluate, normal, shaped, softmax64

from distill_jax import losses, objectives

IGNORED = 255


def kl(s, t):
  p, q = softmax64(t), softmax64(s)
  return (p * (np.log(p) - np.log(q))).sum(-1)


def label_map(rng, *shape, classes=3):
  y = rng.integers(0, classes, shape)
  return np.where(rng.random(shape) < 0.3, IGNORED, y).astype(np.int32)


@jax.jit
def means_and_gradient(s, teacher, batch):
  """Returns the means of both terms at the labels' size, and the gradient of their sum."""
  terms = (
    objectives.logits(losses.kl_divergence, ignore_label=IGNORED, resize=True),
    objectives.labels(ignore_label=IGNORED, resize=True),
  )

  def total(s):
    means = tuple(evaluate(term, {"logits": s}, teacher, batch)[1] for term in terms)
    return sum(means), means

  (_, means), gradient = jax.value_and_grad(total, has_aux=True)(s)
  return means, gradient


@pytest.mark.parametrize(
  ("grid", "weights"), [((4, 6), [0.5, 2.0, 1.0]), ((2, 4, 3), None)], ids=["image", "volume"]
)
def test_distillation_counts_labeled_pixels_by_their_class(rng, grid, weights):
  s, t = normal(rng, 2, 2, *grid, 3)
  y = label_map(rng, 2, *grid)
  y[0, 0] = -1
  counted = (y != IGNORED) & (y >= 0)
  t[~counted] = np.nan
  term = objectives.logits(losses.kl_divergence, ignore_label=IGNORED, class_weights=weights)
  (values, where), mean = evaluate(term, {"logits": s}, {"logits": t}, {"label": y})
  expected = kl(s[counted], t[counted]) * (1 if weights is None else np.array(weights)[y[counted]])
  np.testing.assert_array_equal(where, counted)
  np.testing.assert_allclose(values[counted], expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
  # The labels' own term counts the same pixels.
  hard = objectives.labels(ignore_label=IGNORED, class_weights=weights)
  (_, labeled), _ = evaluate(hard, {"logits": s}, {}, {"label": y})
  np.testing.assert_array_equal(labeled, counted)


@pytest.mark.parametrize(
  ("loss", "shape"),
  [
    (optax.sigmoid_binary_cross_entropy, (2, 4, 6, 1)),
    (optax.squared_error, (2, 4, 6)),
    (optax.squared_error, (3, 8, 1)),
  ],
)
def test_one_number_per_pixel_counts_labeled_pixels(rng, loss, shape):
  """An image with an ignored pixel did not count."""
  s = normal(rng, *shape)
  y = label_map(rng, *shape[: -1 if shape[-1] == 1 else None], classes=2)
  counted = y != IGNORED
  s[~counted] = np.nan
  batch = {"label": y.astype(np.float32) if loss is optax.squared_error else y}
  term = objectives.labels(loss, ignore_label=IGNORED)
  (_, where), mean = evaluate(term, {"logits": s}, {}, batch)
  np.testing.assert_array_equal(where, counted)
  np.testing.assert_allclose(mean, loss(s.reshape(y.shape), y)[counted].mean(), rtol=1e-5)
  # A loss with a value per image cannot leave out pixels: these images do not count.
  axes = tuple(range(1, y.ndim))
  term = objectives.labels(lambda s, y: loss(s, y).mean(axes), ignore_label=IGNORED)
  (_, where), _ = evaluate(term, {"logits": s}, {}, batch)
  np.testing.assert_array_equal(where, counted.all(axes))


def test_one_logit_per_pixel_is_distilled_where_labels_are(rng):
  s, t = normal(rng, 2, 2, 4, 6, 1)
  y = label_map(rng, 2, 4, 6, classes=2)
  term = objectives.logits(losses.binary_kl, ignore_label=IGNORED)
  (values, where), mean = evaluate(term, {"logits": s}, {"logits": t}, {"label": y})
  np.testing.assert_array_equal(where, y != IGNORED)
  pair = [np.concatenate([np.zeros_like(z), z], -1) for z in (s, t)]
  np.testing.assert_allclose(values[where], kl(*pair)[where], rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(mean, kl(*pair)[where].mean(), rtol=1e-4)
  with pytest.raises(ValueError, match=r"^label: .*0 to 1, got 2"):
    batch = {"label": jnp.full((2, 4, 6), 2)}
    term.apply({}, {}, {"logits": s}, {"logits": t}, batch, step=0, key=KEY)


def test_masks_of_rows_entries_and_labels_are_combined(rng):
  s, t = normal(rng, 2, 3, 4, 4, 3)
  y, valid = label_map(rng, 3, 4, 4), rng.random((3, 4, 4)) < 0.5
  batch = {"mask": y, "valid": valid, "where": np.array([True, False, True])}
  s[1], t[1] = np.nan, np.nan

  def loss(student, teacher, labels):
    return labels * (student - teacher).sum(-1)

  term = objectives.logits(loss, label="mask", ignore_label=IGNORED, valid="valid")
  (_, where), mean = evaluate(term, {"logits": s}, {"logits": t}, batch)
  counted = (y != IGNORED) & valid & batch["where"][:, None, None]
  np.testing.assert_array_equal(where, counted)
  expected = y[counted] * (s - t)[counted].sum(-1)
  np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)


def test_top_k_of_a_teacher_takes_the_same_mask(rng):
  s, t = normal(rng, 2, 2, 4, 4, 5)
  y = label_map(rng, 2, 4, 4, classes=5)
  options = {"ignore_label": IGNORED, "class_weights": [1, 2, 3, 4, 0]}
  full = objectives.logits(losses.kl_divergence, **options)
  sparse = objectives.sparse(losses.sparse_kl, k=5, **options)
  pair = [evaluate(term, {"logits": s}, {"logits": t}, {"label": y}) for term in (full, sparse)]
  np.testing.assert_allclose(pair[0][1], pair[1][1], rtol=1e-5)
  np.testing.assert_array_equal(pair[0][0][1], pair[1][0][1])


@pytest.mark.parametrize("grid", [(2, 3), (1, 2, 2)])
def test_logits_are_resized_to_the_labels(rng, grid):
  size = tuple(4 * n for n in grid)
  s, t = normal(rng, 2, *grid, 3), normal(rng, 2, *(2 * n for n in grid), 3)
  y = label_map(rng, 2, *size)
  counted = y != IGNORED
  counted[1] = False
  z, target = interpolate(s, size)[counted], interpolate(t, size)[counted]
  # What pads the batch reaches neither value nor gradient.
  s[1], t[1] = np.inf, np.nan
  teacher, batch = {"logits": t}, {"label": y, "where": np.array([True, False])}
  means, gradient = means_and_gradient(s, teacher, batch)
  expected = kl(z, target).mean(), -np.log(softmax64(z))[range(len(z)), y[counted]].mean()
  np.testing.assert_allclose(means, expected, rtol=1e-5)
  assert np.isfinite(gradient).all() and gradient[0].any() and not gradient[1].any()


def test_without_labels_the_larger_grid_counts(rng):
  s, t = normal(rng, 2, 4, 4, 3), normal(rng, 2, 2, 2, 3)
  term = objectives.logits(losses.kl_divergence, resize=True)
  for student, teacher in [(s, t), (t, s)]:
    (values, _), _ = evaluate(term, {"logits": student}, {"logits": teacher}, {})
    expected = kl(interpolate(student, (4, 4)), interpolate(teacher, (4, 4)))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_regression_maps_are_resized(rng):
  s, y = normal(rng, 2, 2, 2, 1), normal(rng, 2, 4, 4)
  term = objectives.labels(lambda s, y: (s - y) ** 2, output="depth", resize=True)
  _, mean = evaluate(term, {"depth": s}, {}, {"depth": y})
  np.testing.assert_allclose(mean, ((interpolate(s, (4, 4))[..., 0] - y) ** 2).mean(), rtol=1e-5)


def test_a_batch_without_labels_counts_nothing(rng):
  s, t = normal(rng, 2, 2, 3, 3), normal(rng, 2, 4, 6, 3)
  batch = {"label": np.full((2, 8, 12), IGNORED), "where": np.ones(2, bool)}
  means, gradient = means_and_gradient(s, {"logits": t}, batch)
  assert means == (0, 0) and not gradient.any()


def test_label_that_is_no_class_raises_or_gives_nan(rng):
  s, t = {"logits": normal(rng, 1, 2, 2, 3)}, {"logits": normal(rng, 1, 2, 2, 3)}
  batch = {"label": jnp.array([[[0, 1], [2, 3]]])}
  term = objectives.logits(losses.kl_divergence, ignore_label=IGNORED)
  with pytest.raises(ValueError, match=r"^label: .*\b3\b"):
    term.apply({}, {}, s, t, batch, step=0, key=KEY)
  assert np.isnan(evaluate(term, s, t, batch)[1])


@pytest.mark.parametrize(
  ("arguments", "field"),
  [
    ({"ignore_label": 2.5}, "ignore_label"),
    ({"class_weights": [1, -1, 1]}, "class_weights"),
    ({"label": 3}, "label"),
    ({"resize": "label"}, "resize"),
  ],
)
def test_invalid_arguments_raise_at_once(arguments, field):
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    objectives.logits(losses.kl_divergence, **arguments)


def test_logits_that_do_not_fit_raise_in_init():
  soft = functools.partial(objectives.logits, losses.kl_divergence)
  s = shaped(logits=(2, 4, 4, 3))
  for term, teacher, field in [
    (soft(class_weights=[1, 2]), (2, 4, 4, 3), "class_weights"),
    (soft(), (2, 8, 8, 3), "logits: .*resize=True"),
    (soft(resize=True), (2, 2, 8, 3), "logits of the teacher"),
    (soft(resize=True), (2, 16, 3), "logits of the teacher"),
    (soft(resize=True), (2, 8, 8, 4), "logits"),
    (soft(resize=True), (3, 8, 8, 3), "logits"),
  ]:
    with pytest.raises(ValueError, match=f"^{field}"):
      term.init(KEY, s, shaped(logits=teacher))


@pytest.mark.parametrize(
  ("label", "field"),
  [
    (np.zeros((2, 8, 8), np.float32), "label: .*float32"),
    (np.zeros((2, 8, 8, 1), np.int32), r"label: .*label\[\.\.\., 0\]"),
    (np.zeros((2, 8, 2), np.int32), "logits"),
    (np.zeros((2, 8), np.int32), "logits"),
    (np.zeros((3, 8, 8), np.int32), "label"),
  ],
)
def test_label_maps_that_do_not_fit_raise(label, field):
  outputs = {"logits": jnp.zeros((2, 4, 4, 3))}
  for term in (
    objectives.logits(losses.kl_divergence, ignore_label=IGNORED, resize=True),
    objectives.labels(ignore_label=IGNORED, resize=True),
  ):
    with pytest.raises(ValueError, match=f"^{field}"):
      evaluate(term, outputs, outputs, {"label": label}, params={})


def test_top_k_of_another_grid_names_what_can_be_resized():
  outputs = {"logits": jnp.zeros((2, 4, 4, 3))}
  term = objectives.sparse(losses.sparse_kl, k=2, ignore_label=IGNORED)
  with pytest.raises(ValueError, match="^label: .*Dense"):
    evaluate(term, outputs, outputs, {"label": np.zeros((2, 8, 8), int)})


def test_losses_without_a_value_per_pixel_name_the_argument():
  outputs = {"logits": jnp.ones((2, 4, 4, 3))}
  with pytest.raises(ValueError, match="^ignore_label: .*pearson"):
    objectives.logits(losses.pearson, ignore_label=IGNORED)
  term = objectives.logits(losses.cwd, class_weights=[1, 2, 3])
  with pytest.raises(ValueError, match="^class_weights: .*cwd"):
    evaluate(term, outputs, outputs, {"label": np.zeros((2, 4, 4), int)})
