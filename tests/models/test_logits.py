"""Tests that probabilities as 'logits' are rejected before training, of every adapter and role."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import cache, data, losses, objectives, tasks, teachers
from distill_jax.models import from_apply, from_keras, from_linen, from_nnx
from distill_jax.models.logits import check_logits, is_in_unit_range, is_probabilities
from distill_jax.train import RunOptions, evaluate, fit
from distill_jax.types import TrainState

keras = pytest.importorskip("keras")
RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 3)).astype(np.float32)
SOURCE = data.Source({"x": RNG.normal(size=(16, 4)).astype(np.float32)}, name="x")
STUDENT = from_apply(lambda key, x: {"w": jnp.zeros((4, 3))}, lambda p, x: x @ p["w"], inputs="x")
OBJECTIVE = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))


class Subclassed(keras.Model):
  def __init__(self):
    super().__init__()
    self.layer = keras.layers.Dense(3)

  def call(self, x):
    return keras.ops.softmax(self.layer(x))


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return nnx.softmax(self.layer(x)).astype(jnp.bfloat16)


class Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.softmax(linen.Dense(3)(x))


def keras_teacher():
  net = Subclassed()
  net(SOURCE.arrays["x"])
  return from_keras(net, inputs="x")


def function(apply):
  return from_apply(None, apply, variables={"w": jnp.asarray(W)}, inputs="x")


def linen_teacher():
  variables = Linen().init(jax.random.key(0), SOURCE.arrays["x"])
  return from_linen(Linen(), variables, inputs="x")


TEACHERS = {
  "nnx": lambda: from_nnx(Nnx(nnx.Rngs(0)), inputs="x"),
  "linen": linen_teacher,
  "keras": keras_teacher,
  "functions": lambda: function(lambda p, x: jax.nn.softmax(x @ p["w"])),
  "mean of two": lambda: function(
    lambda p, x: 0.5 * jax.nn.softmax(x @ p["w"]) + 0.5 * jax.nn.softmax(-x @ p["w"])
  ),
  "float16": lambda: teachers.with_dtype(
    function(lambda p, x: jax.nn.softmax(x @ p["w"])), dtype="float16"
  ),
}


def train(student, teacher):
  options = dict(steps=1, batch_size=16, run=RunOptions(progress=False))
  return fit(student, teacher, OBJECTIVE, optax.sgd(0.1), SOURCE, **options)


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_of_probabilities_raises(name):
  with pytest.raises(ValueError, match=r"^teacher: .*log"):
    train(STUDENT, TEACHERS[name]())


def test_student_of_probabilities_raises():
  student = from_apply(
    lambda key, x: {"w": jnp.ones((4, 3))}, lambda p, x: jax.nn.softmax(x @ p["w"]), inputs="x"
  )
  with pytest.raises(ValueError, match=r"^student: .*log"):
    train(student, function(lambda p, x: x @ p["w"]))


def test_cache_of_probabilities_raises_and_writes_nothing(tmp_path):
  with pytest.raises(ValueError, match=r"^teacher: .*log"):
    cache.write_cache(tmp_path / "cache", TEACHERS["functions"](), SOURCE, progress=False)
  with pytest.raises(cache.Incomplete):
    cache.open_cache(tmp_path / "cache")


def test_evaluation_of_probabilities_raises():
  labeled = data.Source({**SOURCE.arrays, "label": np.arange(16) % 3}, classes=3)
  good, bad = function(lambda p, x: x @ p["w"]), function(lambda p, x: jax.nn.softmax(x @ p["w"]))
  task = tasks.classification()
  with pytest.raises(ValueError, match="^model: .*probabilities"):
    evaluate(bad, None, labeled, task)
  with pytest.raises(ValueError, match="^teacher: .*probabilities"):
    evaluate(good, None, labeled, task, teacher=bad)
  pair = evaluate(good, None, labeled, task, teacher=(good, good.variables))
  assert evaluate(good, None, labeled, task, teacher=good) == pair
  with pytest.raises(ValueError, match=r"^task: .*classification\(\)"):
    evaluate(good, None, labeled, tasks.classification)
  with pytest.raises(ValueError, match=r"^teacher: .*\(model, variables\)"):
    evaluate(good, None, labeled, task, teacher=STUDENT)
  state = TrainState(*[None] * len(TrainState._fields))
  with pytest.raises(ValueError, match=r"^variables: .*result\.variables"):
    evaluate(good, state, labeled, task)


def test_log_probabilities_and_other_names_are_taken():
  log = function(lambda p, x: jax.nn.log_softmax(x @ p["w"]))
  assert np.isfinite(train(STUDENT, log).history[-1]["loss"])
  named = function(lambda p, x: {"logits": x @ p["w"], "probabilities": jax.nn.softmax(x @ p["w"])})
  assert np.isfinite(train(STUDENT, named).history[-1]["loss"])


@pytest.mark.parametrize(
  ("logits", "expected"),
  [
    (np.eye(3), True),
    (np.full((8, 3), 1 / 3), True),
    (np.full((2, 5, 4), 0.25), True),
    (np.zeros((8, 3)), False),
    (np.abs(W), False),
    (np.array([[0.5, 0.5], [0.5, 0.6]]), False),
    (np.array([[1.5, -0.5]]), False),
    (np.array([[np.nan, 1.0]]), False),
  ],
)
def test_is_probabilities(logits, expected):
  assert is_probabilities(logits) == expected


SIGMOIDS = {
  "sigmoid": lambda p, x: jax.nn.sigmoid(x @ p["w"]),
  "one logit": lambda p, x: jax.nn.sigmoid(x @ p["w"][:, :1]),
  "cast": lambda p, x: jax.jit(nnx.sigmoid)(x @ p["w"]).astype(jnp.bfloat16).reshape(-1, 3),
}


@pytest.mark.parametrize("field", ["teacher", "student"])
@pytest.mark.parametrize("name", SIGMOIDS)
def test_sigmoid_outputs_warn(name, field):
  model = function(SIGMOIDS[name])
  with pytest.warns(UserWarning, match=rf"^{field}: expected logits, .*sigmoid.*special\.logit"):
    check_logits(field, model, model.variables, {"x": SOURCE.arrays["x"][:8]})


def test_sigmoid_by_hand_warns_of_a_teacher_only():
  model = function(lambda p, x: 1 / (1 + jnp.exp(-x @ p["w"])))
  with pytest.warns(UserWarning, match="^teacher: .*sigmoid"):
    check_logits("teacher", model, model.variables, dict(SOURCE.arrays))
  check_logits("student", model, model.variables, dict(SOURCE.arrays))


@pytest.mark.parametrize(
  "apply",
  [
    lambda p, x: x @ p["w"],
    lambda p, x: jax.nn.sigmoid(x @ p["w"]) - 0.5,
    lambda p, x: jax.scipy.special.logit(jax.nn.sigmoid(x @ p["w"])),
    lambda p, x: {"logits": x @ p["w"], "gate": jax.nn.sigmoid(x @ p["w"])},
  ],
)
def test_logits_do_not_warn(apply):
  model = function(apply)
  check_logits("teacher", model, model.variables, dict(SOURCE.arrays))


@pytest.mark.parametrize(
  ("logits", "expected"),
  [
    (np.linspace(0, 1, 16)[:, None], True),
    (np.linspace(0, 1, 15)[:, None], False),
    (np.linspace(0, 1.1, 16)[:, None], False),
    (np.full((16, 1), 0.5), False),
    (np.linspace([0.1, 0.5], [0.5, 0.9], 16), False),
    (np.eye(4), False),
  ],
)
def test_is_in_unit_range(logits, expected):
  assert is_in_unit_range(logits) == expected
