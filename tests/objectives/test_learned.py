"""Terms with learned parts: equal to their losses by hand; gradients, training, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learned_cases import (
  CASES,
  KEY,
  MARGIN,
  NO_PARAMS,
  NO_STUDENT,
  WHERE,
  outputs,
  paraphraser_params,
  problem,
)

from distill_jax import losses, objectives, reduce
from distill_jax.objectives import weighted
from distill_jax.types import Variables


@pytest.mark.parametrize("name", CASES)
def test_term_equals_its_loss_by_hand(name):
  _, params, state, evaluate = problem(name)
  student, teacher, batch = outputs()
  (_, (value, new_state)), _ = evaluate(params, student, state)
  expected, expected_state = CASES[name][1](params, state, student, teacher, batch)
  if isinstance(value, tuple):
    values, where = map(np.asarray, value)
    np.testing.assert_array_equal(where, WHERE)
    value, expected = values[WHERE], np.asarray(expected)[WHERE]
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=2e-4)
  if name == "queue_similarity":  # A ring: the oldest row is at `next`.
    new_state = np.roll(new_state["queue"], -int(new_state["next"]), 0)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, new_state, expected_state)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_learned_parts_and_valid_rows(name):
  _, params, state, evaluate = problem(name)
  _, gradients = evaluate(params, outputs()[0], state)
  to_params, to_student = jax.tree.map(np.asarray, gradients)
  assert bool(jax.tree.leaves(params)) != (name in NO_PARAMS)
  for path, leaf in jax.tree_util.tree_leaves_with_path(to_params):
    assert np.isfinite(leaf).all() and (leaf != 0).any(), path
  reached = [x for x in to_student.values() if (x != 0).any()]
  assert bool(reached) != (name in NO_STUDENT)
  for x in reached:
    rows = (x != 0).any(tuple(range(1, x.ndim)))
    np.testing.assert_array_equal(rows, WHERE)


@pytest.mark.parametrize("name", CASES)
def test_training_lowers_the_term(name):
  _, params, state, evaluate = problem(name)
  variables = params, outputs()[0]
  values = []
  for _ in range(4):
    (value, _), gradients = evaluate(*variables, state)
    values.append(float(value))
    variables = jax.tree.map(
      lambda x, g: x - np.float32(0.003) * np.sign(np.asarray(g)), variables, gradients
    )
  assert values[3] < values[0], values


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_features_are_compared_in_float32(name):
  term, params, state, evaluate = problem(name)
  low = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), side) for side in outputs()[:2]]
  apply = functools.partial(term.apply, step=jnp.int32(5), key=KEY)
  value, new_state = jax.eval_shape(apply, params, state, *low, outputs()[2])
  assert jax.tree.leaves(value)[0].dtype == jnp.float32
  assert jax.tree.map(lambda x: x.dtype, new_state) == jax.tree.map(lambda x: x.dtype, state)
  if name == "ofd":
    value, _ = jax.jit(apply)(params, state, *low, outputs()[2])
    expected = evaluate(params, outputs()[0], state)[0][0]
    np.testing.assert_allclose(reduce.mean(*value), expected, rtol=0.03)


def test_layer_attention_learns_which_layer_to_follow(rng):
  """The teacher's maps are larger or smaller; its last one is the student's second."""
  sizes = (8, 2, 1, 4)
  s = {f"s{i}": rng.normal(size=(8, 4, 4, 6)).astype(np.float32) for i in range(2)}
  t = {f"t{i}": rng.normal(size=(8, n, n, 5)).astype(np.float32) for i, n in enumerate(sizes)}
  last = "t3"
  t[last] = s["s1"]
  term = objectives.layer_attention(tuple(s), tuple(t), width=4)
  params = term.init(KEY, s, t).params

  def mean(params, term):
    return reduce.mean(*term.apply(params, {}, s, t, {}, step=0, key=KEY)[0])

  evaluate = jax.jit(jax.value_and_grad(functools.partial(mean, term=term)))
  values = []
  for _ in range(60):
    value, gradients = evaluate(params)
    values.append(float(value))
    params = jax.tree.map(
      lambda x, g: np.asarray(x) - 0.3 * np.sign(np.asarray(g)), params, gradients
    )
  assert values[-1] < values[0]
  # The student's map that it chose for the teacher's last one is that map itself.
  names = ("queries", "bilinear", "teacher_position")
  params = params._replace(**{name: getattr(params, name)[-1:] for name in names})
  only_last = objectives.layer_attention(tuple(s), (last,), width=4)
  compare = jax.jit(functools.partial(mean, term=only_last))
  assert compare(params) < 0.1 * compare(jax.tree.map(np.zeros_like, params))


def test_margins_are_read_from_the_path_of_the_batch_norm():
  norm = {"scale": jnp.ones(2), "bias": jnp.array([0.0, 9.0])}
  params = {"blocks": [{"norm": norm, "conv": jnp.ones(1)}]}
  margins = jax.jit(functools.partial(objectives.ofd_margin_at, path="blocks/0/norm"))(params)
  np.testing.assert_allclose(margins, [-np.sqrt(2 / np.pi), -3], rtol=1e-5)
  with pytest.raises(ValueError, match="^path: .*'blocks/0/nrom'.*'blocks/0/norm'"):
    objectives.ofd_margin_at(params, "blocks/0/nrom")


def test_without_a_paraphraser_the_map_is_the_factor():
  student, teacher, _ = outputs()
  channels = teacher["one"].shape[-1]
  for paraphraser, width in ((None, channels), (paraphraser_params(), channels // 2)):
    term = objectives.factor_transfer("one", "one", paraphraser)
    params, _ = jax.eval_shape(lambda key, term=term: term.init(key, student, teacher), KEY)
    assert params["2"]["layer"]["kernel"].shape[-1] == width


def test_learned_compares_trees_of_outputs():
  def init(key, s, t):
    return Variables({}, {"steps": jnp.zeros((), jnp.int32)})

  def apply(params, state, s, t, *, step):
    return losses.weight_alignment(s, t) + 0 * step, {"steps": state["steps"] + 1}

  term = objectives.learned("weights", "weights", init, apply)
  s, t = ({"weights": {"q": np.full((3, 3), x, np.float32)}} for x in (1, 3))
  params, state = term.init(KEY, s, t)
  value, state = term.apply(params, state, s, t, {}, step=4, key=KEY)
  assert value == 4 and state == {"steps": 1}


def test_mgd_of_flat_volumes_equals_that_of_maps():
  student, teacher, batch = outputs()
  params = problem("mgd_space")[1]
  flat = [{"one": np.nan_to_num(side["one"])[:, None, :4, :4]} for side in (student, teacher)]
  term = objectives.mgd("one", "one")
  shapes = jax.eval_shape(term.init, KEY, *flat).params["generator"]
  assert {x["kernel"].shape for x in shapes.values()} == {(3, 3, 3, 10, 10)}

  def thick(x, shape):  # The other planes meet the zeros around a depth of 1 only.
    return jnp.broadcast_to(x, shape.shape)

  generator = {
    i: {"kernel": thick(layer["kernel"], shapes[i]["kernel"]), "bias": layer["bias"]}
    for i, layer in params["generator"].items()
  }
  volumes = {"align": params["align"], "generator": generator}

  @jax.jit
  def both(volumes, params):
    options = {"step": 0, "key": KEY}
    maps = [jax.tree.map(lambda x: x[:, 0], side) for side in flat]
    (values, _), _ = term.apply(volumes, {}, *flat, batch, **options)
    return values, term.apply(params, {}, *maps, batch, **options)[0][0]

  np.testing.assert_allclose(*both(volumes, params), rtol=1e-5)


def test_uskd_skips_unlabeled_rows():
  term, params, state, _ = problem("uskd")
  student, teacher, batch = outputs()
  label = np.where(np.arange(16) == 3, -1, batch["label"])  # Row 3 counts otherwise.
  where = WHERE & (label >= 0)

  @jax.jit
  def value(label, where):
    batch = {"label": label, "where": where}
    return term.apply(params, state, student, teacher, batch, step=0, key=KEY)[0]

  skipped, masked = value(label, WHERE), value(batch["label"], where)
  np.testing.assert_allclose(skipped, masked, rtol=1e-6)
  assert abs(masked - value(batch["label"], WHERE)) > 1e-3


# what does not fit


@pytest.mark.parametrize(
  ("make", "field"),
  [
    (lambda: objectives.mgd("one", "one", over="rows"), "over: .*'rows'"),
    (lambda: objectives.mgd("one", "one", mask_fraction=1.0), "mask_fraction"),
    (lambda: objectives.review_kd("one", ("one",)), "student, teacher"),
    (lambda: objectives.review_kd(("one", "two"), ("one",)), "student, teacher"),
    (lambda: objectives.paraphraser("one", rate=0), "rate"),
    (lambda: objectives.layer_attention("one", "two"), "student, teacher"),
    (lambda: objectives.fgd("one", "one", stride=0), "stride"),
    (lambda: objectives.crd("flat", "flat", 1), "examples"),
    (lambda: objectives.crd("flat", "flat", 2, negatives=0), "negatives"),
    (lambda: objectives.queue_similarity("flat", "flat", size=0), "size"),
    (lambda: objectives.cirkd("one", "one", 0), "num_classes"),
    (lambda: objectives.cirkd("one", "one", 2, pixels=0), "pixels"),
    (lambda: objectives.cirkd("one", "one", 2, samples=5), "samples"),
    (lambda: objectives.cirkd("one", "one", 2, samples=(5, 0)), "samples"),
    (lambda: objectives.cirkd("one", "one", 2, temperature=0.0), "temperature"),
    (lambda: objectives.cirkd("one", "one", 2, region_weight=-1.0), "region_weight"),
    (lambda: objectives.vitkd("last", "last"), "student, teacher"),
    (lambda: objectives.vitkd(("last",), ("last",)), "student, teacher"),
    (lambda: objectives.vitkd(("first", "last"), ("last",)), "student, teacher"),
    (lambda: objectives.vitkd(("first", "last"), ("last",) * 2, mask_fraction=0), "mask_fraction"),
    (lambda: objectives.vitkd(("first", "last"), ("last",) * 2, prefix_tokens=-1), "prefix_tokens"),
    (lambda: objectives.srd("flat", "flat", power=0.5), "power"),
    (lambda: objectives.activation_boundary("one", "one", margin=-1.0), "margin"),
  ],
)
def test_invalid_argument_raises_at_once(make, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    make()


@pytest.mark.parametrize(
  ("make", "field"),
  [
    (
      lambda: objectives.vid("one", "flat"),
      r"'one' \(16, 8, 8, 6\) and teacher 'flat' \(16, 9\).*ranks",
    ),
    (lambda: objectives.mgd("flat", "flat"), r"'flat' \(16, 12\).*4 or 5 axes"),
    (lambda: objectives.review_kd(("clip",), ("clip",)), r"4 axes.*objectives\.mgd"),
    (lambda: objectives.factor_transfer("clip", "clip"), r"4 axes.*objectives\.mgd"),
    (lambda: objectives.fgd("clip", "clip", stride=1), r"4 axes.*objectives\.mgd"),
    (
      lambda: objectives.layer_attention(("clip",), ("clip",)),
      r"student: expected maps \[B, H, W, C\]",
    ),
    (lambda: objectives.ofd("one", "one", MARGIN[:3]), "margin"),
    (lambda: objectives.vkd("falt", "flat"), "falt: .*'flat'"),
    (lambda: objectives.factor_transfer("two", "two", paraphraser_params()), "paraphraser: "),
    (lambda: objectives.layer_attention(("flat",), ("one",)), r"\(16, 12\)"),
    (lambda: objectives.dino("flat", "flat"), r"\[B, V, K\]"),
    (lambda: objectives.queue_similarity("one", "flat"), r"\[B, C\]"),
    (lambda: objectives.cirkd("flat", "flat", 2), "4 or 5 axes"),
    (lambda: objectives.pad("one", "flat"), "ranks"),
    (lambda: objectives.uskd("two", output="one"), "feature: "),
    (lambda: objectives.uskd("tow", output="flat"), "tow: .*'two'"),
    (lambda: objectives.vitkd(("first", "last"), ("first", "last")), "prefix_tokens: .* 5 of 5"),
    (lambda: objectives.vitkd(("one", "last"), ("one", "last"), prefix_tokens=1), "3 axes"),
    (
      lambda: objectives.vitkd(("first", "last"), ("first", "last"), prefix_tokens=1, alpha=-1.0),
      "alpha",
    ),
  ],
)
def test_outputs_that_do_not_fit_raise_in_init(make, field):
  goal = weighted(term=(1.0, make()))
  clip = {"clip": np.ones((16, 2, 4, 4, 3), np.float32)}
  with pytest.raises(ValueError, match=f"^term 'term': .*{field}"):
    jax.eval_shape(goal.init, KEY, *(side | clip for side in outputs()[:2]))


def test_missing_entry_of_the_batch_raises():
  for name, entry in (("crd", "id"), ("fgd", "boxes"), ("uskd", "label"), ("cirkd", "classes")):
    term, params, state, _ = problem(name)
    with pytest.raises(ValueError, match=f"^{entry}: "):
      term.apply(params, state, *outputs()[:2], {"image": 0}, step=0, key=KEY)
