"""Tests the weights that users give to `fit`: their forms, and that none is ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from distill_jax import cache, data, losses, objectives, teachers
from distill_jax.compression.initialization.teacher import init_from_teacher
from distill_jax.models import cohort, from_apply, from_linen
from distill_jax.models.variables import as_variables
from distill_jax.train import RunOptions, fit, predict
from distill_jax.types import Variables

RNG = np.random.default_rng(0)
SOURCE = data.Source({"x": RNG.normal(size=(16, 4)).astype(np.float32)}, name="x")
SOFT = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
QUIET = RunOptions(progress=False)


class Normed(linen.Module):
  @linen.compact
  def __call__(self, x, train):
    return linen.Dense(3)(linen.BatchNorm(use_running_average=not train)(x))


NORMED = from_linen(Normed(), inputs="x")
COLLECTIONS = jax.tree.map(
  lambda x: np.asarray(x) + np.float32(0.5),
  Normed().init(jax.random.key(3), SOURCE.arrays["x"], train=False),
)
PARAMS = {"w": RNG.normal(size=(4, 3)).astype(np.float32)}


def init(key, x):
  return {"w": jax.random.normal(key, (4, 3))}


def apply(params, x):
  return x @ params["w"]


PLAIN = from_apply(init, apply, inputs="x")
TEACHER = from_apply(init, apply, inputs="x", variables=PARAMS)


def train(student, teacher=TEACHER, rate=0.0, **options):
  options = dict(steps=1, batch_size=16, run=QUIET) | options
  return fit(student, teacher, SOFT, optax.sgd(rate), SOURCE, **options)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
  "values", [PARAMS, {"params": PARAMS}, Variables(PARAMS, {}), (PARAMS, {})]
)
def test_student_starts_from_given_weights(values):
  result = train(PLAIN, student_variables=values)
  assert_same(result.variables.params, PARAMS)


def test_collections_are_taken_of_a_student_and_of_a_teacher():
  pair = Variables(COLLECTIONS["params"], {"batch_stats": COLLECTIONS["batch_stats"]})
  expected = train(NORMED, NORMED, student_variables=pair, teacher_variables=pair)
  frozen = linen.FrozenDict(COLLECTIONS)
  result = train(NORMED, NORMED, student_variables=COLLECTIONS, teacher_variables=frozen)
  assert_same(result.variables, expected.variables)
  assert_same(result.variables.params, COLLECTIONS["params"])
  assert result.history[-1]["loss"] == expected.history[-1]["loss"]


def test_student_starts_from_its_teachers_layers():
  start = PLAIN.init(jax.random.key(0), SOURCE.arrays)
  params, origins = init_from_teacher(start.params, TEACHER.variables.params, {"^w$": "w"})
  result = train(PLAIN, student_variables=start._replace(params=params))
  assert_same(result.variables.params, PARAMS)
  assert origins["w"].source == "w"
  assert result.history[-1]["loss"] == 0.0


def test_given_weights_have_the_dtypes_of_the_network():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  assert train(PLAIN, student_variables=half).variables.params["w"].dtype == jnp.float32


def test_given_weights_are_copied():
  start = jax.tree.map(jnp.asarray, PARAMS)
  train(PLAIN, rate=1.0, student_variables=start)
  assert_same(start, PARAMS)


def test_weights_of_a_model_are_never_ignored():
  with pytest.raises(ValueError, match="^student: .*student_variables="):
    train(PLAIN._replace(variables=Variables(PARAMS, {})))
  other = Variables({"w": PARAMS["w"] + 1}, {})
  with pytest.raises(ValueError, match="^student: .*student_variables="):
    train(TEACHER._replace(init=lambda key, batch: other))
  result = train(TEACHER, student_variables=other)
  assert_same(result.variables.params, other.params)


def test_replaced_weights_of_a_teacher_teach():
  for values in (Variables(PARAMS, {}), {"params": PARAMS}):
    teacher = PLAIN._replace(variables=values)
    assert_same(predict(teacher, None, SOURCE)["logits"], predict(TEACHER, None, SOURCE)["logits"])
    result = train(PLAIN, teacher, student_variables=PARAMS)
    assert result.history[-1]["loss"] == 0.0


def test_replaced_weights_of_one_member_start_a_cohort():
  members = cohort([PLAIN._replace(variables=Variables(PARAMS, {})), PLAIN])
  result = train(members)
  assert_same(result.variables.params["0"], PARAMS)
  assert (result.variables.params["1"]["w"] != PARAMS["w"]).any()


@pytest.mark.parametrize(
  ("values", "hint"),
  [
    ({"v": PARAMS["w"]}, "'params/w'.*got no"),
    ({"w": PARAMS["w"][:2]}, r"\(4, 3\).*'params/w'.*\(2, 3\)"),
    (Variables(PARAMS, {"mean": np.zeros(3)}), "no 'state/mean'"),
    (TEACHER, "Model.*variables"),
    ({"w": "text"}, "str at 'params/w'"),
  ],
)
@pytest.mark.parametrize("field", ["student_variables", "teacher_variables"])
def test_weights_of_another_network_raise(field, values, hint):
  teacher = TEACHER if field == "student_variables" else PLAIN
  with pytest.raises(ValueError, match=f"^{field}: .*{hint}"):
    train(PLAIN, teacher, **{field: values})


@pytest.mark.parametrize("field", ["student_variables", "teacher_variables"])
def test_weights_with_nan_raise_before_training(field):
  values = {"w": PARAMS["w"] * np.nan}
  with pytest.raises(ValueError, match=f"^{field}: .*NaN at 'params/w'"):
    train(PLAIN, TEACHER if field == "student_variables" else PLAIN, **{field: values})


def test_average_of_another_network_raises():
  other = from_apply(lambda key, x: {"v": x[0]}, lambda p, x: x + p["v"], inputs="x")
  with pytest.raises(ValueError, match=r"^teacher: .*moving_average\(student\)"):
    train(PLAIN, teachers.moving_average(other))


def test_student_without_parameters_raises():
  student = from_apply(lambda key, x: {}, lambda p, x: x[:, :3], inputs="x")
  with pytest.raises(ValueError, match="^student: .*got none"):
    train(student)


def test_near_names_are_quoted_once():
  with pytest.raises(ValueError, match=r"did you mean 'params/w1'\?"):
    train(PLAIN, student_variables={"w1": PARAMS["w"]})


def test_params_alone_are_too_few_with_batch_statistics():
  with pytest.raises(ValueError, match="^student_variables: .*batch_stats"):
    train(NORMED, student_variables=COLLECTIONS["params"])


def test_cache_takes_collections(tmp_path):
  written = cache.write_cache(
    tmp_path / "cache", NORMED, SOURCE, teacher_variables=COLLECTIONS, progress=False
  )
  train(PLAIN, written, teacher_variables=COLLECTIONS)
  with pytest.raises(cache.Mismatch):
    other = jax.tree.map(lambda x: x + 1, COLLECTIONS)
    train(PLAIN, written, teacher_variables=other)


def test_start_is_part_of_a_runs_identity(tmp_path):
  options = dict(checkpoints=tmp_path / "run", student_variables=PARAMS)
  train(PLAIN, **options)
  with pytest.raises(ValueError, match="student_variables"):
    train(PLAIN, **options | {"student_variables": {"w": PARAMS["w"] + 1}})


def test_integer_parameter_is_named():
  student = from_apply(
    lambda key, x: init(key, x) | {"n": {"steps": jnp.int32(0)}}, apply, inputs="x"
  )
  with pytest.raises(ValueError, match="^student: .*int32.*'n/steps'"):
    train(student)


def test_repr_of_a_result_is_short():
  text = repr(train(PLAIN))
  assert len(text) < 500 and "parameters=12" in text


def test_a_number_is_no_weights():
  with pytest.raises(ValueError, match="^student_variables: .*float"):
    as_variables("student_variables", 3.0)
