"""Terms of detectors next to float64 formulas: necks of several levels, and heads."""

import functools

import detector_references as by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detector_references import GRIDS, ROWS, WHERE, outputs
from terms_by_hand import KEY, evaluate

from distill_jax import losses, objectives, reduce
from distill_jax.objectives import features, fgd, locations, mgd, score_weighted, summed, weighted

STRIDES = {"p3": 8, "p4": 16}
LEVELS = tuple(STRIDES)


def of_levels(make):
  return summed(*[make(name) for name in LEVELS])


TERMS = {
  "fgd": of_levels(lambda name: fgd(name, name, stride=STRIDES[name], relation=0.01)),
  "mgd": of_levels(lambda name: mgd(name, name)),
  "pearson": of_levels(lambda name: features(name, name, losses.pearson)),
  "cwd": of_levels(lambda name: features(name, name, losses.cwd, temperature=2.0)),
  "score_weighted": score_weighted(LEVELS, LEVELS),
  "binary": locations(losses.binary_kl, output="class_logits", temperature=2.0),
  "softmax": locations(losses.kl_divergence, output="class_logits", background=True),
  "bins": locations(losses.localization, output="box_bins"),
  "all_bins": objectives.logits(losses.localization, output="box_bins"),
}
LEARNED = tuple(TERMS)[:5]


def fgd_by_hand(params, s, t, batch, name, key):
  s = by_hand.resized(by_hand.dense(params["align"], s), GRIDS[name])
  values = []
  for a, b, boxes, label in zip(s, t, batch["boxes"], batch["label"]):
    weights = by_hand.foreground(boxes, label >= 0, STRIDES[name], GRIDS[name])
    values.append(by_hand.fgd(a, b, weights, params["context"], relation=0.01))
  return np.mean(values)


def mgd_by_hand(params, s, t, batch, name, key):
  s = by_hand.resized(by_hand.dense(params["align"], s), GRIDS[name])
  unmasked = jax.random.bernoulli(key, 1 - 0.65, (ROWS, *GRIDS[name], 1))
  return by_hand.mgd(params["generator"], s, t, np.asarray(unmasked)[WHERE]).mean()


def pearson_by_hand(params, s, t, batch, name, key):
  return by_hand.pearson(by_hand.resized(by_hand.dense(params, s), GRIDS[name]), t)


def cwd_by_hand(params, s, t, batch, name, key):
  s = by_hand.resized(by_hand.dense(params, s), GRIDS[name])
  return by_hand.cwd(s, t, temperature=2.0).mean()


def score_weighted_by_hand(params, s, t, batch, name, key):
  hidden = np.maximum(by_hand.dense(params["0"], by_hand.resized(s, GRIDS[name])), 0)
  scores = by_hand.confidence(outputs()[1]["class_logits"][WHERE])
  size = np.prod(GRIDS["p3"])
  part = scores[:, :size] if name == "p3" else scores[:, size:]
  adapted = by_hand.dense(params["1"], hidden)
  return by_hand.score_weighted(adapted, t, part.reshape(len(s), *GRIDS[name]))


def expected(params):
  """Returns the means of `TERMS` over the rows that count."""
  student, teacher, batch = jax.tree.map(lambda x: x[WHERE], outputs())
  s, t = ({name: np.float64(x) for name, x in side.items()} for side in (student, teacher))
  values = {}
  for i, term in enumerate(LEARNED):
    f, key = globals()[f"{term}_by_hand"], jax.random.fold_in(KEY, i)
    values[term] = sum(
      f(params[term][str(j)], s[name], t[name], batch, name, jax.random.fold_in(key, j))
      for j, name in enumerate(LEVELS)
    )
  logits, bins = (s["class_logits"], t["class_logits"]), (s["box_bins"], t["box_bins"])
  of_bins = by_hand.localization(*bins)
  weights = by_hand.confidence(logits[1])
  by_softmax = by_hand.confidence(logits[1], background=True)
  values["binary"] = by_hand.locations(by_hand.binary_kl(*logits, temperature=2.0), weights).mean()
  values["softmax"] = by_hand.locations(by_hand.kl_divergence(*logits), by_softmax).mean()
  return values | {"bins": by_hand.locations(of_bins, weights).mean(), "all_bins": of_bins.mean()}


def test_terms_equal_formulas_and_reach_no_masked_row():
  objective = weighted(**{name: (1.0, term) for name, term in TERMS.items()})
  student, teacher, batch = outputs()
  shapes, state = jax.eval_shape(lambda key: objective.init(key, student, teacher), KEY)
  assert not jax.tree.leaves(state)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shapes)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def total(params, student):
    terms, _ = objective.apply(
      params, {name: state[name] for name in TERMS}, student, teacher, batch, step=0, key=KEY
    )
    values = [x for _, x in terms.values()]
    means = [reduce.mean(*x) if isinstance(x, tuple) else x for x in values]
    return sum(means), dict(zip(terms, means))

  (_, means), (to_params, to_student) = total(params, student)
  by_formula = expected(params)
  assert by_formula.keys() == TERMS.keys()
  for name, value in by_formula.items():
    np.testing.assert_allclose(means[name], value, rtol=1e-4, err_msg=name)
  for path, gradient in jax.tree_util.tree_leaves_with_path(to_params):
    assert np.isfinite(gradient).all() and gradient.any(), path
  for name, gradient in to_student.items():
    np.testing.assert_array_equal(gradient.any(tuple(range(1, gradient.ndim))), WHERE, name)


def test_scores_of_several_anchors_are_the_largest_of_a_position(rng):
  s, t = ({"p3": rng.normal(size=(2, 2, 3, 4)).astype(np.float32)} for _ in range(2))
  z = rng.normal(size=(2, 2, 3, 5, 3)).astype(np.float32)  # Five anchors and three classes.
  one_anchor = {"class_logits": z.max(3).reshape(2, 6, 3)}
  all_anchors = {"class_logits": z.reshape(2, 30, 3)}
  term = score_weighted("p3", "p3")
  means = [evaluate(term, s, t | z, {})[1] for z in (one_anchor, all_anchors)]
  np.testing.assert_allclose(*means, rtol=1e-6)


def test_locations_follow_a_schedule_and_other_scores(rng):
  s, t = (rng.normal(size=(2, 6, 3)).astype(np.float32) for _ in range(2))
  other = rng.normal(size=(2, 6, 1)).astype(np.float32)
  term = locations(
    losses.binary_kl, output="z", scores="objectness", temperature=lambda step: 2.0 + step
  )
  (values, where), _ = evaluate(term, {"z": s}, {"z": t, "objectness": other}, {})
  by_formula = by_hand.binary_kl(np.float64(s), np.float64(t), temperature=2.0)
  np.testing.assert_allclose(
    values, by_hand.locations(by_formula, by_hand.sigmoid(other[..., 0])), rtol=1e-5
  )
  assert where is None


def test_boxes_count_by_area_class_and_crowd(monkeypatch):
  """One box counts, or two; the third is padding."""
  boxes = np.array([[[0, 0, 8, 8], [40, 40, 56, 48], [0, 0, 0, 0]]], np.float32)
  maps = {"p3": jnp.zeros((1, 8, 8, 2))}
  exists = {"exists": np.array([[True, False, False]]), "label": np.array([[-1, -1, -1]])}
  cases = [
    ({}, None, 2),
    ({"label": np.array([[1, 0, -1]])}, None, 2),
    ({"label": np.array([[1, -1, -1]])}, None, 1),
    ({"crowd": np.array([[False, True, False]])}, None, 1),
    ({"label": np.array([2])}, None, 2),  # The image's.
    (exists, "exists", 1),
  ]
  terms = [fgd("p3", "p3", stride=8, valid=valid) for _, valid, _ in cases]
  monkeypatch.setattr(losses, "fgd", lambda s, t, foreground, context: foreground.sum((1, 2)))
  # Each box weighs 1 in all, and lies in one part of the map.
  for term, (entries, _, count) in zip(terms, cases):
    params = {"align": {}, "context": ()}
    batch = {"boxes": boxes} | entries
    (values, _), _ = term.apply(params, {}, maps, maps, batch, step=0, key=KEY)
    np.testing.assert_allclose(values, count, rtol=1e-5, err_msg=str(entries))


@pytest.mark.parametrize(
  ("stride", "image", "fits"),
  [
    (8, (64, 48), True),
    (8, (57, 41), True),  # Convolutions pad the last rows and columns.
    (8, (79, 63), True),  # They do not, and lose up to two positions.
    (4, (64, 48), False),
    (16, (64, 48), False),
    (8, (64, 96), False),
  ],
)
def test_stride_is_that_of_the_image(stride, image, fits):
  maps = {"p3": jax.ShapeDtypeStruct((1, 8, 6, 2), jnp.float32)}
  boxes = jax.ShapeDtypeStruct((1, 3, 4), jnp.float32)
  batch = {"image": jax.ShapeDtypeStruct((1, *image, 3), jnp.float32), "boxes": boxes}
  term = fgd("p3", "p3", stride=stride)

  def run(maps, batch):
    variables = term.init(KEY, maps, maps)
    return term.apply(*variables, maps, maps, batch, step=0, key=KEY)

  if fits:
    jax.eval_shape(run, maps, batch)
  else:
    with pytest.raises(ValueError, match=f"^stride: .*'p3', 8 x 6 .*got {stride}: about"):
      jax.eval_shape(run, maps, batch)


LOGITS = np.zeros((2, 20, 3), np.float32)


@pytest.mark.parametrize(
  ("student", "teacher", "options", "message"),
  [
    ({"z": LOGITS[:, :5]}, {"z": LOGITS}, {}, "^z: expected one shape.*grids or anchors"),
    ({"z": LOGITS[..., :2]}, {"z": LOGITS}, {}, "^z: expected one shape.*select_classes"),
    ({"z": LOGITS}, {"z": LOGITS[..., :2]}, {}, "^z: expected one shape.*teacher lacks"),
    ({"z": LOGITS[0]}, {"z": LOGITS[0]}, {}, r"^z: expected \[B, A, ...\]"),
    (
      {"z": LOGITS},
      {"z": LOGITS, "c": LOGITS[:, :4]},
      {"scores": "c"},
      "^c: expected class logits",
    ),
    ({"z": LOGITS}, {"z": LOGITS, "c": LOGITS[..., 0]}, {"scores": "c"}, "^c: expected class log"),
    (
      {"z": LOGITS},
      {"z": LOGITS, "c": LOGITS[..., :1]},
      {"scores": "c", "background": True},
      r"^c: expected .*C \+ 1",
    ),
    ({"z": LOGITS}, {"z": LOGITS}, {"scores": "class_logits"}, "^class_logits: expected an output"),
  ],
)
def test_heads_that_do_not_fit_raise(student, teacher, options, message):
  options = {"scores": "z"} | options
  with pytest.raises(ValueError, match=message):
    locations(losses.binary_kl, output="z", **options).init(KEY, student, teacher)


@pytest.mark.parametrize("loss", [losses.hint, losses.l1, lambda s, t: (s - t) ** 2])
def test_loss_without_a_value_for_each_location_raises(loss):
  term = locations(loss, output="z", scores="z")
  with pytest.raises(ValueError, match="^loss: expected .*each location"):
    term.init(KEY, {"z": LOGITS}, {"z": LOGITS})


@pytest.mark.parametrize("loss", [losses.dkd, losses.pearson, "binary_kl"])
def test_loss_of_labels_or_rows_raises_at_once(loss):
  with pytest.raises(ValueError, match="^loss: expected"):
    locations(loss, output="z")


@pytest.mark.parametrize(
  ("names", "teacher", "message"),
  [
    (("p3", "p4"), {}, "^student .*class_logits: expected class logits.*20 positions"),
    (("p3",), {"class_logits": LOGITS[:, :17]}, "class_logits: expected .*16 positions"),
    (("p3",), {"p3": np.zeros((2, 5))}, "their ranks differ"),
    (("p3", "p5"), {}, "^p5: expected an output"),
  ],
)
def test_scores_that_do_not_fit_the_levels_raise(names, teacher, message):
  side = {"p3": np.zeros((2, 4, 4, 3)), "p4": np.zeros((2, 2, 2, 3))}
  teacher = side | {"class_logits": np.zeros((2, 21, 4))} | teacher
  with pytest.raises(ValueError, match=message):
    score_weighted(names, names).init(KEY, side, teacher)


def test_other_numbers_of_names_raise_at_once():
  for names in (("p3",), ()):
    with pytest.raises(ValueError, match="^student, teacher: expected"):
      score_weighted(names, ("p3", "p4")[: 2 * len(names)])
  with pytest.raises(ValueError, match="^scores: expected one a position"):
    losses.score_weighted(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), jnp.zeros((2, 4)))
