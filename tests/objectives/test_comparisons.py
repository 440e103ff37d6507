"""Terms that compare outputs of two networks, against float64 numpy; what does not fit raises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from terms_by_hand import KEY, evaluate, normal, shaped, softmax64

from distill_jax import losses, objectives, reduce
from distill_jax.objectives import features, labels, logits, weighted


def gram(s, t, *, where=None, axis_name=None):
  """A loss that relates the valid rows."""
  gap = (s @ s.T - t @ t.T) ** 2
  valid = where[:, None] & where[None] if where is not None else jnp.ones_like(gap, bool)
  return reduce.mean(gap.reshape(-1), valid.reshape(-1), axis_name=axis_name)


def at_label(s, t, labels):
  return jnp.abs(jnp.take_along_axis(s - t, labels[..., None], -1)[..., 0])


# logits


def test_loss_gets_hyperparameters_and_mask(rng):
  s, t = normal(rng, 2, 6, 5)
  where = np.array([1, 1, 0, 1, 0, 1], bool)
  t[4] = np.nan
  p, q = softmax64(t / 3), softmax64(s / 3)
  term = logits(losses.kl_divergence, temperature=3.0)
  _, mean = evaluate(term, {"logits": s}, {"logits": t}, {"where": where})
  np.testing.assert_allclose(mean, 9 * (p * np.log(p / q)).sum(-1)[where].mean(), rtol=1e-4)
  aux = logits(losses.soft_cross_entropy, output="aux")
  _, mean = evaluate(aux, {"aux": s}, {"aux": t}, {"where": where})
  expected = -(softmax64(t) * np.log(softmax64(s))).sum(-1)[where].mean()
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize("masked", ["rows", "tokens"])
def test_masks_of_rows_and_of_tokens(rng, masked):
  s, t = normal(rng, 2, 4, 3, 5)
  y = rng.integers(0, 5, (4, 3)).astype(np.int32)
  y[0, 1] = -1
  where = rng.random((4,) if masked == "rows" else (4, 3)) > 0.4
  valid = np.broadcast_to(where.reshape(4, -1), (4, 3))
  batch = {"label": y, "where": where}
  each = -np.log(np.take_along_axis(softmax64(s), y.clip(0)[..., None], -1)[..., 0])
  _, mean = evaluate(labels(), {"logits": s}, {}, batch)
  np.testing.assert_allclose(mean, each[valid & (y >= 0)].mean(), rtol=1e-5)
  _, mean = evaluate(logits(losses.kl_divergence), {"logits": s}, {"logits": t}, batch)
  p, q = softmax64(t), softmax64(s)
  np.testing.assert_allclose(mean, (p * np.log(p / q)).sum(-1)[valid].mean(), rtol=1e-4)


def test_loss_with_labels_skips_unlabeled_rows(rng):
  s, t = normal(rng, 2, 5, 4)
  y = np.array([3, -1, 0, 2, 1], np.int32)
  batch = {"label": y, "where": np.array([1, 1, 1, 0, 1], bool)}
  _, mean = evaluate(logits(at_label), {"logits": s}, {"logits": t}, batch)
  rows = [0, 2, 4]
  np.testing.assert_allclose(mean, np.abs(s - t)[rows, y[rows]].mean(), rtol=1e-6)
  for batch in ({}, {"label": np.ones((5, 4), np.float32) / 4}):
    with pytest.raises(ValueError, match="^label: "):
      evaluate(logits(at_label), {"logits": s}, {"logits": t}, batch)


def test_loss_that_relates_rows_gets_mask_and_axis(rng):
  s, t = normal(rng, 2, 6, 4)
  where = np.array([1, 0, 1, 1, 0, 1], bool)
  term = logits(gram)
  value, mean = evaluate(term, {"logits": s}, {"logits": t}, {"where": where})
  v, w = s[where].astype(float), t[where].astype(float)
  np.testing.assert_allclose(mean, ((v @ v.T - w @ w.T) ** 2).mean(), rtol=1e-4)
  assert value.ndim == 0
  # Without a mask the loss gets None.
  value, _ = evaluate(term, {"logits": s}, {"logits": t}, {})
  np.testing.assert_allclose(value, gram(s, t), rtol=1e-6)

  def on_device(s, t):
    outputs = {"logits": s}, {"logits": t}
    return evaluate(term, *outputs, {}, params={}, axis_name="data")[0]

  s, t = s.reshape(2, 3, 4), t.reshape(2, 3, 4)
  mapped = jax.pmap(on_device, axis_name="data")(s, t)
  mean = np.mean([gram(*rows) for rows in zip(s, t)])
  np.testing.assert_allclose(mapped, [mean, mean], rtol=1e-4)


def test_relational_loss_with_labels_gets_labeled_rows_only():
  def loss(s, t, labels, *, where):
    return reduce.mean(labels.astype(jnp.float32), where)

  batch = {"label": np.array([4, -1, 2, 8]), "where": np.array([1, 1, 1, 0], bool)}
  z = {"logits": np.zeros((4, 9), np.float32)}
  assert evaluate(logits(loss), z, z, batch)[0] == 3


@pytest.mark.parametrize(
  ("student", "teacher"),
  [
    ((8, 12), (8, 10)),
    ((8, 12), (8, 1)),
    ((8, 12), (1, 12)),
    ((8, 3, 12), (8, 12)),
  ],
)
def test_logits_of_different_shapes_raise_with_both(student, teacher):
  goal = weighted(soft=(1.0, logits(losses.kl_divergence)))
  shapes = f"{student}.*{teacher}".replace("(", r"\(").replace(")", r"\)")
  with pytest.raises(ValueError, match=f"term 'soft': logits: .*{shapes}"):
    goal.init(KEY, shaped(logits=student), shaped(logits=teacher))
  arrays = [{"logits": np.ones(shape, np.float32)} for shape in (student, teacher)]
  with pytest.raises(ValueError, match=f"term 'soft': logits: .*{shapes}"):
    goal.apply({"soft": {}}, {"soft": {}}, *arrays, {}, step=0, key=KEY)


def test_teacher_with_other_classes_can_distill_features():
  goal = weighted(hard=(1.0, labels()), hint=(1.0, features("a", "b", losses.hint)))
  goal.init(KEY, shaped(logits=(8, 12), a=(8, 4)), shaped(logits=(8, 10), b=(8, 4)))


def test_missing_teacher_raises_with_term_and_output():
  with pytest.raises(ValueError, match="term 'soft': logits: "):
    weighted(soft=(1.0, logits(losses.kl_divergence))).init(KEY, shaped(logits=(8, 12)), {})


# hyper-parameters


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [logits, functools.partial(features, "logits", "logits")])
def test_temperature_out_of_range_raises_in_init(make, temperature):
  term = make(losses.kl_divergence, temperature=temperature)
  with pytest.raises(ValueError, match="temperature"):
    term.init(KEY, shaped(logits=(2, 5)), shaped(logits=(2, 5)))


def test_init_calls_the_loss_on_the_real_shapes():
  shapes = []

  def maps(s, t, *, power):
    shapes.append((s.shape, t.shape))
    if power <= 0:
      raise ValueError(f"power: expected a number > 0, got {power}")
    return (jnp.abs(s - t) ** power).sum((1, 2, 3))

  outputs = shaped(a=(2, 4, 4, 3)), shaped(b=(2, 8, 8, 3))
  term = features("a", "b", maps, power=0)
  assert not shapes
  with pytest.raises(ValueError, match="power"):
    term.init(KEY, *outputs)
  features("a", "b", maps, power=2).init(KEY, *outputs)
  assert shapes == [((2, 8, 8, 3), (2, 8, 8, 3))] * 2


def test_unknown_or_missing_hyperparameter_raises_at_once():
  with pytest.raises(ValueError, match="^temprature: .*kl_divergence.*'temperature'"):
    logits(losses.kl_divergence, temprature=2.0)
  with pytest.raises(ValueError, match="^scale: .*hint"):
    features("a", "b", losses.hint, scale=2.0)
  with pytest.raises(ValueError, match="^class_maks: .*'class_mask'"):
    logits(losses.kl_divergence, entries={"class_maks": "classes"})

  def powered(s, t, labels, *, power):
    return (s - t).sum(-1)

  with pytest.raises(ValueError, match="^loss: .*powered.*'power'"):
    logits(powered)
  logits(powered, power=2.0)


def test_class_mask_of_other_classes_raises_in_init():
  term = logits(losses.kl_divergence, class_mask=np.ones(5, bool))
  term.init(KEY, shaped(logits=(2, 5)), shaped(logits=(2, 5)))
  with pytest.raises(ValueError, match="class_mask"):
    term.init(KEY, shaped(logits=(2, 6)), shaped(logits=(2, 6)))


# features


@pytest.mark.parametrize(
  ("s_shape", "t_shape"), [((4, 2, 3), (4, 2, 5)), ((4, 6, 6, 3), (4, 6, 6, 5))]
)
def test_projection_is_one_linear_map_of_the_channels(rng, s_shape, t_shape):
  s, t = normal(rng, *s_shape), normal(rng, *t_shape)
  term = features("a", "b", losses.hint)
  params = term.init(KEY, {"a": s}, {"b": t}).params
  assert jax.tree.map(jnp.shape, params) == {"kernel": (3, 5), "bias": (5,)}
  params = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.5), params)
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {}, params=params)
  projected = np.einsum("...c,cd->...d", s.astype(float), params["kernel"]) + params["bias"]
  np.testing.assert_allclose(values, ((projected - t) ** 2).reshape(4, -1).mean(-1), rtol=1e-4)


@pytest.mark.parametrize("t_shape", [(2, 4, 4, 3), (2, 12, 6, 5)])
def test_maps_are_resized_to_the_teachers(rng, t_shape):
  s, t = normal(rng, 2, 8, 8, 3), normal(rng, *t_shape)
  term = features("a", "b", losses.hint)
  params = term.init(KEY, {"a": s}, {"b": t}).params
  assert bool(params) == (t_shape[-1] != 3)
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {}, params=params)
  aligned = np.asarray(jax.image.resize(s, (*t_shape[:3], 3), "linear"))
  if params:
    aligned = aligned @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
  np.testing.assert_allclose(values, ((aligned - t) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_halving_a_map_averages_it_with_a_triangle():
  s = np.zeros((1, 8, 8, 1), np.float32)
  s[0, 4, 4] = 1
  t = np.zeros((1, 4, 4, 1), np.float32)
  term = features("a", "b", lambda s, t: s.reshape(1, -1).sum(-1))
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {})
  # Antialiased: no pixel is dropped, so the mean stays.
  np.testing.assert_allclose(values, 0.25, rtol=1e-5)


def test_projection_learns_by_gradient_descent(rng):
  s = normal(rng, 32, 3)
  t = s @ normal(rng, 3, 5) + 1
  goal = weighted(hint=(1.0, features("a", "b", losses.hint)))
  params = goal.init(KEY, {"a": s}, {"b": t}).params

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def evaluate_goal(params, s):
    terms, _ = goal.apply(params, {"hint": {}}, {"a": s}, {"b": t}, {}, step=0, key=KEY)
    return reduce.mean(*terms["hint"][1])

  start, (to_params, to_student) = evaluate_goal(params, s)
  assert (to_student != 0).all() and all((leaf != 0).all() for leaf in jax.tree.leaves(to_params))
  for _ in range(100):
    value, (to_params, _) = evaluate_goal(params, s)
    params = jax.tree.map(lambda x, g: np.asarray(x) - 0.5 * np.asarray(g), params, to_params)
  assert value < 0.01 * start


def test_equal_widths_and_project_false_learn_nothing(rng):
  assert features("a", "b", losses.hint).init(KEY, shaped(a=(4, 3)), shaped(b=(4, 3))).params == {}
  narrow, wide = normal(rng, 4, 3), normal(rng, 4, 5)
  term = features("a", "b", gram, project=False)
  assert term.init(KEY, {"a": narrow}, {"b": wide}).params == {}
  value, _ = evaluate(term, {"a": narrow}, {"b": wide}, {})
  np.testing.assert_allclose(value, gram(narrow, wide), rtol=1e-6)
  with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 5\)"):
    features("a", "b", losses.hint, project=False).init(KEY, {"a": narrow}, {"b": wide})


def test_volumes_are_resized_along_all_axes(rng):
  """Half of each side: a triangle of 4 positions, as `jax.image.resize` antialiases."""
  student, teacher = normal(rng, 2, 4, 4, 4, 3), normal(rng, 2, 2, 2, 4, 3)
  matrix = np.array([[0.375, 0.375, 0.125, 0], [0, 0.125, 0.375, 0.375]])
  matrix /= matrix.sum(1, keepdims=True)
  halved = np.einsum("bdhwc,id,jh->bijwc", student, matrix, matrix)
  (values, _), _ = evaluate(features("a", "b", losses.hint), {"a": student}, {"b": teacher}, {})
  expected = ((halved - teacher) ** 2).reshape(2, -1).mean(1)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_mask_of_frames_needs_a_value_for_each_frame(rng):
  clips = {"a": normal(rng, 2, 3, 1, 2, 4)}, {"a": normal(rng, 2, 3, 1, 2, 4)}
  frames = {"frames": np.array([[True, True, False], [True, False, False]])}
  values, where = evaluate(features("a", "a", losses.cosine, valid="frames"), *clips, frames)[0]
  np.testing.assert_array_equal(where, frames["frames"])
  assert values.shape == (2, 3, 1, 2)
  for loss in (losses.hint, losses.attention_transfer):
    with pytest.raises(ValueError, match="^valid: .*losses.cosine"):
      evaluate(features("a", "a", loss, valid="frames"), *clips, frames)


def test_resize_false_rejects_maps_that_the_loss_does():
  term = features("a", "b", losses.hint, resize=False)
  term.init(KEY, shaped(a=(2, 4, 4, 3)), shaped(b=(2, 4, 4, 5)))
  with pytest.raises(ValueError, match="^resize: "):
    term.init(KEY, shaped(a=(2, 4, 4, 3)), shaped(b=(2, 8, 8, 3)))


@pytest.mark.parametrize(
  ("student", "teacher", "problem"),
  [
    ((4, 8), (4, 6, 6, 8), "ranks"),
    ((4, 8), (5, 8), "rows"),
    ((4, 8), (1, 8), "rows"),
    ((4, 7, 8), (4, 9, 8), "lengths"),
    ((4,), (4,), "channels"),
    ((), (), "channels"),
  ],
)
def test_impossible_pair_raises_with_both_shapes(student, teacher, problem):
  goal = weighted(hint=(1.0, features("a", "b", losses.hint)))
  shapes = f"'a' {student}.*'b' {teacher}".replace("(", r"\(").replace(")", r"\)")
  with pytest.raises(ValueError, match=f"term 'hint': .*{shapes}.*{problem}"):
    goal.init(KEY, shaped(a=student), shaped(b=teacher))


def test_unknown_features_name_the_nearest():
  outputs = shaped(block1=(4, 8), logits=(4, 2))
  with pytest.raises(ValueError, match="term 'h': blokc1: .*student.*'block1'"):
    weighted(h=(1.0, features("blokc1", "block1", losses.hint))).init(KEY, outputs, outputs)
  with pytest.raises(ValueError, match=r"^xyz: .*teacher.*\['block1', 'logits'\]"):
    features("block1", "xyz", losses.hint).init(KEY, outputs, outputs)


def test_bfloat16_features_are_compared_in_float32(rng):
  s, t = jnp.asarray(normal(rng, 4, 3), jnp.bfloat16), normal(rng, 4, 5)
  term = features("a", "b", losses.hint)
  params = term.init(KEY, {"a": s}, {"b": t}).params
  assert params["kernel"].dtype == jnp.float32
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {}, params=params)
  assert values.dtype == jnp.float32
  expected = ((np.asarray(s, float) @ np.asarray(params["kernel"], float) - t) ** 2).mean(-1)
  np.testing.assert_allclose(values, expected, rtol=0.05)


# mutual learning


def test_mutual_is_the_sum_over_students_of_the_mean_over_peers(rng):
  names = [f"{i}/logits" for i in range(3)]
  z = {name: normal(rng, 4, 5) for name in names}
  term = objectives.mutual(losses.kl_divergence, 3)
  variables = term.init(KEY, z, {})

  @jax.jit
  @jax.value_and_grad
  def total(z):
    (values, where), _ = term.apply(*variables, z, {}, {}, step=0, key=KEY)
    assert where is None
    return values.sum()

  def kl(s, t):
    log_p, log_q = (scipy.special.log_softmax(np.float64(x), -1) for x in (t, s))
    return (np.exp(log_p) * (log_p - log_q)).sum()

  value, gradients = total(z)
  expected = sum(kl(z[a], z[b]) / 2 for a in names for b in names if a != b)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  # A peer is held constant: d KL(p, q) / ds = q - p of each peer, halved.
  p = {name: softmax64(z[name]) for name in names}
  for name in names:
    slope = sum(p[name] - p[peer] for peer in names if peer != name) / 2
    np.testing.assert_allclose(gradients[name], slope, rtol=1e-4, atol=1e-6)


def test_mutual_needs_two_students_and_their_outputs():
  with pytest.raises(ValueError, match="^students: .*got 1"):
    objectives.mutual(losses.kl_divergence, 1)
  with pytest.raises(ValueError, match="^1/logits: "):
    objectives.mutual(losses.kl_divergence, 2).init(KEY, shaped(**{"0/logits": (2, 3)}), {})
  term = objectives.mutual(losses.kl_divergence, 2, temperature=0)
  with pytest.raises(ValueError, match="temperature"):
    term.init(KEY, shaped(**{"0/logits": (2, 3), "1/logits": (2, 3)}), {})


# two vocabularies, maps of any size, and what is no loss


def test_uld_compares_two_vocabularies(rng):
  s, t = np.arange(5, dtype=np.float32)[None] / 2, np.arange(7, dtype=np.float32)[None] ** 1.5 / 4
  p = np.sort(softmax64(t)[0])[::-1]
  q = np.pad(np.sort(softmax64(s)[0])[::-1], (0, 2))
  expected = np.abs(p - q).sum()
  outputs = {"logits": s}, {"logits": t}
  _, mean = evaluate(logits(losses.uld), *outputs, {})
  np.testing.assert_allclose(mean, expected, rtol=1e-5)
  _, mean = evaluate(features("logits", "logits", losses.uld, project=False), *outputs, {})
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "loss"), [("logits", losses.uld), ("text", losses.uld), ("logits", losses.hint)]
)
def test_no_projection_between_vocabularies_is_learned(name, loss):
  term = features(name, name, loss)
  with pytest.raises(ValueError, match="objectives.logits\\(losses.uld\\)"):
    term.init(KEY, shaped(**{name: (2, 5)}), shaped(**{name: (2, 7)}))


@pytest.mark.parametrize("name", ["similarity_preserving", "inter_channel", "pkt"])
def test_resize_false_compares_maps_of_other_sizes_as_they_are(rng, name):
  loss = getattr(losses, name)
  s, t = normal(rng, 4, 4, 4, 3), normal(rng, 4, 2, 2, 3)
  term = features("a", "b", loss, resize=False)
  _, mean = evaluate(term, {"a": s}, {"b": t}, {})
  np.testing.assert_allclose(mean, reduce.mean(loss(s, t)), rtol=1e-5)


@pytest.mark.parametrize(
  ("loss", "hint"),
  [
    ("kl", "'kl_divergence'"),
    ("kl_divergense", "'kl_divergence'"),
    (None, "NoneType"),
    (labels(), "Term"),
    (3, "int"),
    (dict, "class dict"),
    (lambda y_true, y_pred: y_pred, "y_true"),
  ],
)
def test_what_is_no_loss_raises_at_once(loss, hint):
  for make in (
    logits,
    functools.partial(features, "a", "b"),
    objectives.sparse,
    objectives.weights,
  ):
    with pytest.raises(ValueError, match=f"^loss: .*{hint}"):
      make(loss)
  with pytest.raises(ValueError, match=f"^loss: .*{hint}"):
    objectives.layers([(1, 1)], loss)


@pytest.mark.parametrize(
  "values",
  [lambda s: None, lambda s: (s, s), lambda s: s[1:], lambda s: s > 0, lambda s: s.argmax(-1)],
)
def test_loss_of_other_values_raises_in_init(values):
  goal = weighted(soft=(1.0, logits(lambda s, t: values(s))))
  with pytest.raises(ValueError, match="^term 'soft': loss: "):
    goal.init(KEY, shaped(logits=(4, 3)), shaped(logits=(4, 3)))


def test_scalar_of_masked_rows_needs_an_argument_where():
  z = {"logits": np.ones((4, 3), np.float32)}
  term = logits(lambda s, t: (s - t).mean())
  assert evaluate(term, z, z, {})[0] == 0
  with pytest.raises(ValueError, match="^loss: .*where"):
    evaluate(term, z, z, {"where": np.ones(4, bool)})


def summed(s, t):
  return ((s - t) ** 2).sum(0)


def test_sum_over_the_batch_is_not_taken_for_one_value_a_row():
  """With as many rows as classes both are [3]."""
  z = {"logits": np.arange(9, dtype=np.float32).reshape(3, 3)}
  with pytest.raises(ValueError, match="^loss: expected summed .* axis 0"):
    evaluate(logits(summed), z, z, {})
  # A loss that knows its number of rows cannot be tried with another one.
  weights = np.array([1.0, 2.0, 3.0], np.float32)
  _, mean = evaluate(logits(lambda s, t: weights * (s + 0 * t).sum(1)), z, z, {})
  np.testing.assert_allclose(mean, 30.0)
