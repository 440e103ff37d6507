"""Every term against float64 numpy and optax, and what does not fit refused early with a message that helps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from distill_jax import losses, objectives, reduce
from distill_jax.objectives import features, labels, logits, weighted
from distill_jax.types import Variables

KEY = jax.random.key(0)


def shaped(**shapes):
  """Outputs that are only shapes, as `make_init` gives them."""
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def evaluate(term, student, teacher, batch, *, params=None, step=0, axis_name=None):
  """A term's value, and its mean as the step takes it."""
  if params is None:
    params = term.init(KEY, student, teacher).params
  value, _ = term.apply(
    params, {}, student, teacher, batch, step=jnp.int32(step), key=KEY, axis_name=axis_name
  )
  return value, reduce.mean(*value) if isinstance(value, tuple) else value


def softmax64(z):
  e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def draw(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def gram(s, t, *, where=None, axis_name=None):
  """A loss that relates the valid rows."""
  gap = (s @ s.T - t @ t.T) ** 2
  valid = where[:, None] & where[None] if where is not None else jnp.ones_like(gap, bool)
  return reduce.mean(gap.reshape(-1), valid.reshape(-1), axis_name=axis_name)


def at_label(s, t, labels):
  return jnp.abs(jnp.take_along_axis(s - t, labels[..., None], -1)[..., 0])


# labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(6,), (4, 3)])
def test_hard_labels_equal_numpy_and_optax(rng, smoothing, shape):
  z, y = 5 * draw(rng, *shape, 7), rng.integers(0, 7, shape).astype(np.int32)
  target = (1 - smoothing) * np.eye(7)[y] + smoothing / 7
  expected = -(target * np.log(softmax64(z))).sum(-1)
  (values, _), mean = evaluate(labels(label_smoothing=smoothing), {"logits": z}, {}, {"label": y})
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
  theirs = optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, 7), smoothing))
  np.testing.assert_allclose(values, theirs, rtol=1e-5)


def test_labels_may_be_rows_of_probabilities(rng):
  z, p = draw(rng, 5, 4), softmax64(draw(rng, 5, 4)).astype(np.float32)
  p[3] = 0  # unlabeled
  _, mean = evaluate(labels(label_smoothing=0.1), {"logits": z}, {}, {"label": p})
  expected = -((0.9 * p + 0.1 / 4) * np.log(softmax64(z))).sum(-1)[[0, 1, 2, 4]].mean()
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_rows_count_that_are_labeled_and_valid(rng):
  z, y = draw(rng, 6, 4), np.array([0, 1, -1, 3, 2, -100], np.int32)
  where = np.array([1, 0, 1, 1, 1, 1], bool)
  each = -np.log(softmax64(z))[np.arange(6), y.clip(0)]
  (_, counted), mean = evaluate(labels(), {"logits": z}, {}, {"label": y, "where": where})
  np.testing.assert_array_equal(counted, [1, 0, 0, 1, 1, 0])
  np.testing.assert_allclose(mean, each[[0, 3, 4]].mean(), rtol=1e-5)
  _, mean = evaluate(labels(), {"logits": z}, {}, {"label": y})
  np.testing.assert_allclose(mean, each[[0, 1, 3, 4]].mean(), rtol=1e-5)
  _, nothing = evaluate(labels(), {"logits": z}, {}, {"label": np.full(6, -1)})
  assert nothing == 0


@pytest.mark.parametrize("shape", [(6,), (6, 3)])
def test_labels_of_what_the_student_wrote_do_not_count(rng, shape):
  z, y = draw(rng, *shape, 4), rng.integers(0, 4, shape).astype(np.int32)
  batch = {"label": y, "where": np.arange(6) != 5, "generated": np.arange(6) % 3 == 1}
  _, mean = evaluate(labels(), {"logits": z}, {}, batch)
  true = [0, 2, 3]
  expected = -np.log(np.take_along_axis(softmax64(z[true]), y[true][..., None], -1)).mean()
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize("masked", ["rows", "tokens"])
def test_masks_of_rows_and_of_tokens(rng, masked):
  z, y = draw(rng, 4, 3, 5), rng.integers(0, 5, (4, 3)).astype(np.int32)
  y[0, 1] = -1
  where = rng.random((4,) if masked == "rows" else (4, 3)) > 0.4
  every = np.broadcast_to(where.reshape(4, -1), (4, 3))
  batch = {"label": y, "where": where}
  each = -np.log(np.take_along_axis(softmax64(z), y.clip(0)[..., None], -1)[..., 0])
  _, mean = evaluate(labels(), {"logits": z}, {}, batch)
  np.testing.assert_allclose(mean, each[every & (y >= 0)].mean(), rtol=1e-5)
  t = draw(rng, 4, 3, 5)
  _, mean = evaluate(logits(losses.kl_divergence), {"logits": z}, {"logits": t}, batch)
  p, q = softmax64(t), softmax64(z)
  np.testing.assert_allclose(mean, (p * np.log(p / q)).sum(-1)[every].mean(), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_missing_classes_stay_finite(rng, smoothing):
  z, y = draw(rng, 4, 5), np.array([0, 1, 2, 0], np.int32)
  z[:, 3:] = -np.inf
  term = labels(label_smoothing=smoothing)
  value, gradient = jax.value_and_grad(
    lambda z: evaluate(term, {"logits": z}, {}, {"label": y})[1]
  )(z)
  _, sliced = evaluate(term, {"logits": z[:, :3]}, {}, {"label": y})
  np.testing.assert_allclose(value, sliced, rtol=1e-6)
  assert np.isfinite(gradient).all() and (gradient[:, 3:] == 0).all()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_is_checked(smoothing):
  with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 1\)"):
    labels(label_smoothing=smoothing)


@pytest.mark.parametrize(
  ("label", "message"),
  [
    (
      np.zeros(6, np.float32),
      r"must be integers \(6,\) or rows of probabilities \(6, 4\), got float32 \(6,\)",
    ),
    (np.zeros((6, 5), np.float32), r"got float32 \(6, 5\)"),
    (np.zeros(5, np.int32), r"labels \(5,\) do not match .*\(6, 4\)"),
    (np.zeros((6, 4), np.int32), r"labels \(6, 4\) do not match"),
    (None, r"the batch has no 'label'; it has \['image'\]"),
  ],
)
def test_labels_that_do_not_fit_are_refused(rng, label, message):
  batch = {"image": 0} if label is None else {"label": label}
  with pytest.raises(ValueError, match=message):
    evaluate(labels(), {"logits": draw(rng, 6, 4)}, {}, batch)


def test_another_output_can_be_labeled(rng):
  z, y = draw(rng, 3, 4), np.arange(3)
  _, mean = evaluate(labels(output="aux"), {"aux": z, "logits": 0 * z}, {}, {"label": y})
  np.testing.assert_allclose(mean, -np.log(softmax64(z))[y, y].mean(), rtol=1e-5)
  with pytest.raises(ValueError, match="student has no output 'auxx'; did you mean 'aux'"):
    labels(output="auxx").init(KEY, shaped(aux=(3, 4)), {})


# logits


def test_a_logit_loss_gets_its_hyperparameters_and_the_mask(rng):
  s, t, where = draw(rng, 6, 5), draw(rng, 6, 5), np.array([1, 1, 0, 1, 0, 1], bool)
  t[4] = np.nan
  p, q = softmax64(t / 3), softmax64(s / 3)
  term = logits(losses.kl_divergence, temperature=3.0)
  _, mean = evaluate(term, {"logits": s}, {"logits": t}, {"where": where})
  np.testing.assert_allclose(mean, 9 * (p * np.log(p / q)).sum(-1)[where].mean(), rtol=1e-4)
  named = logits(losses.soft_cross_entropy, output="aux")
  _, mean = evaluate(named, {"aux": s}, {"aux": t}, {"where": where})
  np.testing.assert_allclose(
    mean, -(softmax64(t) * np.log(softmax64(s))).sum(-1)[where].mean(), rtol=1e-5
  )


def test_a_loss_that_takes_labels_gets_them_and_skips_the_unlabeled(rng):
  s, t, y = draw(rng, 5, 4), draw(rng, 5, 4), np.array([3, -1, 0, 2, 1], np.int32)
  where = np.array([1, 1, 1, 0, 1], bool)
  _, mean = evaluate(logits(at_label), {"logits": s}, {"logits": t}, {"label": y, "where": where})
  rows = [0, 2, 4]
  np.testing.assert_allclose(mean, np.abs(s - t)[rows, y[rows]].mean(), rtol=1e-6)
  for batch, message in (
    ({}, "the batch has no 'label'"),
    (
      {"label": np.ones((5, 4), np.float32) / 4},
      r"needs integer labels, got float32 \(5, 4\).*mixup",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate(logits(at_label), {"logits": s}, {"logits": t}, batch)


def test_a_loss_that_relates_rows_gets_the_mask_and_the_axis(rng):
  s, t, where = draw(rng, 6, 4), draw(rng, 6, 4), np.array([1, 0, 1, 1, 0, 1], bool)
  value, mean = evaluate(logits(gram), {"logits": s}, {"logits": t}, {"where": where})
  v, w = s[where].astype(float), t[where].astype(float)
  np.testing.assert_allclose(mean, ((v @ v.T - w @ w.T) ** 2).mean(), rtol=1e-4)
  assert value.ndim == 0
  # Without a mask the loss is told that there is none.
  value, _ = evaluate(logits(gram), {"logits": s}, {"logits": t}, {})
  np.testing.assert_allclose(value, gram(s, t), rtol=1e-6)

  mapped = jax.pmap(
    lambda s, t: evaluate(
      logits(gram), {"logits": s}, {"logits": t}, {}, params={}, axis_name="data"
    )[0],
    axis_name="data",
  )(s.reshape(2, 3, 4), t.reshape(2, 3, 4))
  parts = np.mean([gram(*pair) for pair in zip(s.reshape(2, 3, 4), t.reshape(2, 3, 4))])
  np.testing.assert_allclose(mapped, [parts, parts], rtol=1e-4)


def test_labeled_relations_see_labeled_rows_only():
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
    ((8, 12), (12,)),
    ((8, 3, 12), (8, 12)),
  ],
)
def test_logits_of_different_shapes_are_refused_with_both(student, teacher):
  goal = weighted(soft=(1.0, logits(losses.kl_divergence)))
  message = rf"term 'soft': student 'logits' \({str(student)[1:-1]}\) and teacher 'logits' \({str(teacher)[1:-1]}\)"
  with pytest.raises(ValueError, match=message):
    goal.init(KEY, shaped(logits=student), shaped(logits=teacher))
  ones = [{"logits": np.ones(shape, np.float32)} for shape in (student, teacher)]
  with pytest.raises(ValueError, match=message):
    goal.apply({"soft": {}}, {"soft": {}}, *ones, {}, step=0, key=KEY)


def test_a_teacher_with_other_classes_still_teaches_features():
  goal = weighted(hard=(1.0, labels()), hint=(1.0, features("a", "b", losses.hint)))
  goal.init(KEY, shaped(logits=(8, 12), a=(8, 4)), shaped(logits=(8, 10), b=(8, 4)))


def test_no_teacher_is_said():
  with pytest.raises(ValueError, match="term 'soft': there is no teacher.*'logits'"):
    weighted(soft=(1.0, logits(losses.kl_divergence))).init(KEY, shaped(logits=(8, 12)), {})


# Hyper-parameters, when the objective is built


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [logits, functools.partial(features, "a", "b")])
def test_a_temperature_out_of_range_is_refused_at_once(make, temperature):
  with pytest.raises(ValueError, match=r"temperature must be in \(0"):
    make(losses.kl_divergence, temperature=temperature)


def test_a_range_is_checked_whatever_the_rank_the_loss_wants():
  def maps(s, t, *, power):
    _, _, _, _ = s.shape
    if power <= 0:
      raise ValueError(f"power must be > 0, got {power}")
    return (jnp.abs(s - t) ** power).sum((1, 2, 3))

  with pytest.raises(ValueError, match="power must be"):
    features("a", "b", maps, power=0)
  term = features("a", "b", maps, power=2)
  with pytest.raises(ValueError, match="not enough values"):
    term.init(KEY, shaped(a=(2, 3)), shaped(b=(2, 3)))


def test_keywords_that_the_loss_does_not_have_or_lacks_are_refused_at_once():
  with pytest.raises(ValueError, match="kl_divergence.*'temprature'; did you mean 'temperature'"):
    logits(losses.kl_divergence, temprature=2.0)
  with pytest.raises(ValueError, match="hint.*'scale'"):
    features("a", "b", losses.hint, scale=2.0)

  def powered(s, t, labels, *, power):
    return (s - t).sum(-1)

  with pytest.raises(ValueError, match="powered.*'power'"):
    logits(powered)
  logits(powered, power=2.0)


def test_what_does_not_fit_the_real_shapes_is_refused_in_init():
  term = logits(losses.kl_divergence, class_mask=np.ones(5, bool))
  term.init(KEY, shaped(logits=(2, 5)), shaped(logits=(2, 5)))
  with pytest.raises(ValueError, match="class_mask"):
    term.init(KEY, shaped(logits=(2, 6)), shaped(logits=(2, 6)))

  def several(s, t):
    if s.shape[-1] < 3:
      raise ValueError("needs at least 3 classes, got 2")
    return (s - t).sum(-1)

  with pytest.raises(ValueError, match="at least 3 classes"):
    logits(several).init(KEY, shaped(logits=(2, 2)), shaped(logits=(2, 2)))


# features


@pytest.mark.parametrize(
  ("s_shape", "t_shape"), [((4, 3), (4, 5)), ((4, 2, 3), (4, 2, 5)), ((4, 6, 6, 3), (4, 6, 6, 5))]
)
def test_the_projection_is_one_linear_map_of_the_channels(rng, s_shape, t_shape):
  s, t = draw(rng, *s_shape), draw(rng, *t_shape)
  term = features("a", "b", losses.hint)
  params = term.init(KEY, {"a": s}, {"b": t}).params
  assert jax.tree.map(jnp.shape, params) == {"kernel": (3, 5), "bias": (5,)}
  params = jax.tree.map(lambda x: x + 0.5, params)
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {}, params=params)
  projected = np.einsum("...c,cd->...d", s.astype(float), params["kernel"]) + np.asarray(
    params["bias"]
  )
  np.testing.assert_allclose(values, ((projected - t) ** 2).reshape(4, -1).mean(-1), rtol=1e-4)


@pytest.mark.parametrize("t_shape", [(2, 4, 4, 3), (2, 8, 8, 3), (2, 12, 6, 3), (2, 8, 8, 5)])
def test_maps_are_resized_to_the_teachers(rng, t_shape):
  s, t = draw(rng, 2, 8, 8, 3), draw(rng, *t_shape)
  term = features("a", "b", losses.hint)
  params = term.init(KEY, {"a": s}, {"b": t}).params
  assert bool(params) == (t_shape[-1] != 3)
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {}, params=params)
  aligned = jax.image.resize(s, (*t_shape[:3], 3), "linear")
  if params:
    aligned = aligned @ params["kernel"] + params["bias"]
  np.testing.assert_allclose(values, ((aligned - t) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_halving_a_map_averages_it_with_a_triangle():
  s = np.zeros((1, 8, 8, 1), np.float32)
  s[0, 4, 4] = 1
  t = np.zeros((1, 4, 4, 1), np.float32)
  (values, _), _ = evaluate(
    features("a", "b", lambda s, t: s.reshape(1, -1).sum(-1)), {"a": s}, {"b": t}, {}
  )
  np.testing.assert_allclose(
    values, 0.25, rtol=1e-5
  )  # antialiased: no pixel is dropped, the mass is kept


def test_the_projection_learns_by_gradient_descent(rng):
  s = draw(rng, 32, 3)
  t = s @ draw(rng, 3, 5) + 1
  goal = weighted(hint=(1.0, features("a", "b", losses.hint)))
  params = goal.init(KEY, {"a": s}, {"b": t}).params

  def loss(params, s):
    terms, _ = goal.apply(params, {"hint": {}}, {"a": s}, {"b": t}, {}, step=0, key=KEY)
    return reduce.mean(*terms["hint"][1])

  start = loss(params, s)
  to_params, to_student = jax.grad(loss, argnums=(0, 1))(params, s)
  assert (to_student != 0).all() and all((leaf != 0).all() for leaf in jax.tree.leaves(to_params))
  descend = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 0.5 * g, p, jax.grad(loss)(p, s)))
  for _ in range(100):
    params = descend(params)
  assert loss(params, s) < 0.01 * start


def test_equal_widths_and_project_false_learn_nothing(rng):
  assert features("a", "b", losses.hint).init(KEY, shaped(a=(4, 3)), shaped(b=(4, 3))).params == {}
  narrow, wide = draw(rng, 4, 3), draw(rng, 4, 5)
  raw = features("a", "b", gram, project=False)
  assert raw.init(KEY, {"a": narrow}, {"b": wide}).params == {}
  value, _ = evaluate(raw, {"a": narrow}, {"b": wide}, {})
  np.testing.assert_allclose(value, gram(narrow, wide), rtol=1e-6)
  with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 5\)"):
    features("a", "b", losses.hint, project=False).init(KEY, {"a": narrow}, {"b": wide})


def test_resize_false_leaves_maps_as_they_are():
  term = features("a", "b", losses.hint, resize=False)
  term.init(KEY, shaped(a=(2, 4, 4, 3)), shaped(b=(2, 4, 4, 5)))
  with pytest.raises(ValueError, match="resize=False"):
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
def test_impossible_pairs_are_refused_with_both_shapes(student, teacher, problem):
  goal = weighted(hint=(1.0, features("a", "b", losses.hint)))
  with pytest.raises(ValueError) as error:
    goal.init(KEY, shaped(a=student), shaped(b=teacher))
  message = str(error.value)
  assert message.startswith(
    f"term 'hint': student 'a' {student} cannot be aligned with teacher 'b' {teacher}"
  )
  assert problem in message


def test_unknown_features_name_the_nearest():
  outputs = shaped(block1=(4, 8), logits=(4, 2))
  with pytest.raises(
    ValueError, match="term 'h': the student has no output 'blokc1'; did you mean 'block1'"
  ):
    weighted(h=(1.0, features("blokc1", "block1", losses.hint))).init(KEY, outputs, outputs)
  with pytest.raises(
    ValueError, match=r"teacher has no output 'xyz'; there are \['block1', 'logits'\]"
  ):
    features("block1", "xyz", losses.hint).init(KEY, outputs, outputs)


def test_bfloat16_features_are_compared_in_float32(rng):
  s, t = jnp.asarray(draw(rng, 4, 3), jnp.bfloat16), draw(rng, 4, 5)
  term = features("a", "b", losses.hint)
  params = term.init(KEY, {"a": s}, {"b": t}).params
  assert params["kernel"].dtype == jnp.float32
  (values, _), _ = evaluate(term, {"a": s}, {"b": t}, {}, params=params)
  assert values.dtype == jnp.float32
  expected = ((np.asarray(s, float) @ np.asarray(params["kernel"], float) - t) ** 2).mean(-1)
  np.testing.assert_allclose(values, expected, rtol=0.05)


# weighted


def test_weights_are_numbers_or_schedules_of_the_step(rng):
  z, y = draw(rng, 4, 3), np.arange(4) % 3
  goal = weighted(
    a=(0.3, labels()),
    b=(np.float32(0), labels()),
    c=(optax.linear_schedule(1.0, 0.0, 10), labels()),
  )
  empty = {name: {} for name in "abc"}

  @jax.jit
  def apply(step):
    return goal.apply(empty, empty, {"logits": z}, {}, {"label": y}, step=step, key=KEY)

  for step, expected in ((0, 1.0), (5, 0.5), (20, 0.0)):
    terms, state = apply(jnp.int32(step))
    np.testing.assert_allclose([float(w) for w, _ in terms.values()], [0.3, 0, expected], atol=1e-6)
    assert state == empty


@pytest.mark.parametrize(
  "weight", [-0.1, float("nan"), float("inf"), "0.1", None, [1.0], np.ones(2), np.float32(-1)]
)
def test_weights_out_of_range_are_refused(weight):
  with pytest.raises(ValueError, match="weight of term 'hard': expected a finite number >= 0"):
    weighted(hard=(weight, labels()))


@pytest.mark.parametrize("name", ["loss", "accuracy", "grad_norm", "nonfinite", "empty"])
def test_the_step_s_own_names_are_refused(name):
  with pytest.raises(ValueError, match=f"a term cannot be called '{name}'"):
    weighted(**{name: (1.0, labels())})


@pytest.mark.parametrize(
  ("term", "message"),
  [
    (labels(), r"expected \(weight, term\), got Term"),
    (1.0, r"expected \(weight, term\), got float"),
    ((1.0, labels(), 2), r"expected \(weight, term\), got tuple"),
    ((1.0, labels), "expected a Term such as .*, got function"),
    ((labels(), 1.0), "expected a Term such as .*, got float"),
  ],
)
def test_what_is_no_weighted_term_is_refused(term, message):
  with pytest.raises(ValueError, match=f"term 'hard': {message}"):
    weighted(hard=term)


def test_no_terms_are_refused():
  with pytest.raises(ValueError, match="no terms"):
    weighted()


def test_terms_have_keys_parameters_and_states_of_their_own():
  drawn = []

  def init(key, student, teacher):
    return Variables({"w": jax.random.normal(key)}, {"n": jnp.int32(0)})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    drawn.append(float(jax.random.normal(key)))
    return params["w"], {"n": state["n"] + 1}

  goal = weighted(a=(1.0, objectives.Term(init, apply)), b=(1.0, objectives.Term(init, apply)))
  params, state = goal.init(KEY, {}, {})
  terms, new = goal.apply(params, state, {}, {}, {}, step=0, key=KEY)
  assert params["a"]["w"] != params["b"]["w"] and drawn[0] != drawn[1]
  assert {name: value for name, (_, value) in terms.items()} == {
    n: p["w"] for n, p in params.items()
  }
  assert new == {"a": {"n": 1}, "b": {"n": 1}}


def test_mutual_is_the_sum_over_students_of_the_mean_over_the_others(rng):
  names = [f"{i}/logits" for i in range(3)]
  z = {name: jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for name in names}
  term = objectives.mutual(losses.kl_divergence, 3)
  variables = term.init(jax.random.key(0), z, {})
  context = dict(step=0, key=jax.random.key(0), axis_name=None)

  def total(z):
    (values, where), _ = term.apply(*variables, z, {}, {}, **context)
    assert where is None
    return values.sum()

  def kl(s, t):
    log_p, log_q = (
      x - scipy.special.logsumexp(x, -1, keepdims=True) for x in map(np.float64, (t, s))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum()

  expected = sum(kl(z[a], z[b]) / 2 for a in names for b in names if a != b)
  np.testing.assert_allclose(total(z), expected, rtol=1e-5)
  # The one who teaches is held constant: the gradient of a student is that of its own KLs alone.
  own = jax.grad(lambda s: sum(losses.kl_divergence(s, z[b]).sum() / 2 for b in names[1:]))(
    z[names[0]]
  )
  np.testing.assert_allclose(jax.grad(total)(z)[names[0]], own, rtol=1e-4, atol=1e-6)


def test_mutual_needs_two_students_and_their_outputs():
  with pytest.raises(ValueError, match="at least 2, got 1"):
    objectives.mutual(losses.kl_divergence, 1)
  with pytest.raises(ValueError, match="no output '1/logits'"):
    objectives.mutual(losses.kl_divergence, 2).init(
      jax.random.key(0), {"0/logits": jnp.ones((2, 3))}, {}
    )
