"""Networks of NNX, Linen and plain functions, as students and as teachers of one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import cache, data, losses, objectives
from distill_jax.models import from_apply, from_linen, from_nnx
from distill_jax.train import RunOptions, StepOptions, fit, predict

QUIET = RunOptions(progress=False)


class NnxNet(nnx.Module):
  def __init__(self, width, rngs):
    self.body = nnx.Linear(4, width, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.norm = nnx.BatchNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(self.norm(jax.nn.relu(self.body(x)))))


class LinenNet(linen.Module):
  width: int

  @linen.compact
  def __call__(self, x, train):
    x = jax.nn.relu(linen.Dense(self.width)(x))
    x = linen.BatchNorm(use_running_average=not train)(x)
    x = linen.Dropout(0.1, deterministic=not train)(x)
    return linen.Dense(3)(x), {"before_head": x}


def plain_init(width):
  def init(key, x):
    keys = jax.random.split(key)
    params = {
      "body": jax.random.normal(keys[0], (4, width)) / 2,
      "head": jax.random.normal(keys[1], (width, 3)) / width**0.5,
    }
    return params, {"mean": jnp.zeros(width)}

  return init


def plain_apply(params, x, *, state, train, key):
  hidden = jax.nn.relu(x @ params["body"])
  if train:
    state = {"mean": 0.9 * state["mean"] + 0.1 * jax.lax.stop_gradient(hidden).mean(0)}
    hidden = hidden + 0.01 * jax.random.normal(key, hidden.shape)
  return {"logits": (hidden - state["mean"]) @ params["head"], "hidden": hidden}, state


STUDENTS = {
  "nnx": (lambda: from_nnx(lambda rngs: NnxNet(8, rngs), inputs="x", features=["body"]), "body"),
  "linen": (lambda: from_linen(LinenNet(8), inputs="x", features={"f": "Dense_0"}), "f"),
  "functions": (lambda: from_apply(plain_init(8), plain_apply, inputs="x"), "hidden"),
}


def teacher_of(kind):
  x = jnp.zeros((1, 4))
  if kind == "nnx":
    return from_nnx(NnxNet(16, nnx.Rngs(1)), inputs="x", features=["body"]), "body"
  if kind == "linen":
    module = LinenNet(16)
    variables = jax.jit(lambda key: module.init(key, x, train=False))(jax.random.key(1))
    return from_linen(module, variables, inputs="x"), "before_head"
  variables = plain_init(16)(jax.random.key(1), x)
  return from_apply(None, plain_apply, variables=variables, inputs="x"), "hidden"


@pytest.mark.parametrize(
  "student, teacher",
  [
    ("nnx", "linen"),
    *(
      pytest.param(*pair, marks=pytest.mark.nightly)
      for pair in (("linen", "functions"), ("functions", "nnx"))
    ),
  ],
)
def test_any_library_distills_any_other(train, student, teacher):
  make, student_feature = STUDENTS[student]
  model, (teacher, teacher_feature) = make(), teacher_of(teacher)
  before = jax.tree.map(np.array, teacher.variables)
  objective = objectives.weighted(
    soft=(1.0, objectives.logits(losses.kl_divergence)),
    hint=(0.1, objectives.features(student_feature, teacher_feature, losses.hint)),
  )
  run = RunOptions(progress=False, log_every=10)
  options = dict(steps=40, batch_size=32, run=run)
  result = fit(model, teacher, objective, optax.adam(0.02), train, **options)
  curve = [line["soft"] for line in result.history]
  assert curve[-1] < 0.5 * curve[0]
  # The learned projection trains with the student and is not exported.
  assert [x.shape for x in jax.tree.leaves(result.state.params["objective"])].count((8, 16)) == 1
  example = jax.jit(model.init)(jax.random.key(0), {"x": train.arrays["x"][:1]})
  assert jax.tree.structure(result.variables) == jax.tree.structure(example)
  jax.tree.map(np.testing.assert_array_equal, teacher.variables, before)
  # The state (batch statistics) followed the data.
  pairs = zip(jax.tree.leaves(result.variables.state), jax.tree.leaves(example.state))
  changed = [not np.array_equal(a, b) for a, b in pairs]
  assert any(changed)


def test_inference_mode_is_deterministic(batch):
  for make, feature in STUDENTS.values():
    model = make()
    variables = jax.jit(model.init)(jax.random.key(0), batch)
    one, two = (predict(model, variables, {"x": batch["x"]}) for _ in range(2))
    np.testing.assert_array_equal(one["logits"], two["logits"])
    assert feature in one
    training = jax.jit(functools.partial(model.apply, train=True))
    outputs, _ = training(*variables, batch, key=jax.random.key(2))
    other, _ = training(*variables, batch, key=jax.random.key(3))
    assert not np.array_equal(outputs["logits"], other["logits"])


def test_adapters_name_missing_inputs_paths_and_kinds(batch):
  models = [
    from_nnx(NnxNet(8, nnx.Rngs(0))),
    from_linen(LinenNet(8), {"params": {}}),
    from_apply(plain_init(8), plain_apply, variables=plain_init(8)(jax.random.key(0), None)),
  ]
  for model in models:
    with pytest.raises(ValueError, match=r"image"):
      predict(model, None, {"x": batch["x"]})
  with pytest.raises(ValueError, match=r"bodi"):
    predict(from_nnx(NnxNet(8, nnx.Rngs(0)), inputs="x", features=["bodi"]), None, batch)
  with pytest.raises(ValueError, match=r"params"):
    from_linen(LinenNet(8), {"kernel": np.zeros(2)})
  with pytest.raises(ValueError, match=r"variables"):
    from_apply(None, plain_apply, variables={"body": 1.0}, inputs="x")


def test_student_from_cache_equals_live_teacher(student, teacher, train, objective, tmp_path):
  """The teacher's outputs are written once and take the teacher's position in `fit`."""
  outputs = cache.write_cache(
    tmp_path / "cache", teacher, train, {"logits": cache.Dense("float32")}, progress=False
  )
  assert outputs.num_examples == 96
  arguments = dict(steps=6, batch_size=16, run=QUIET)
  live = fit(student, teacher, objective, optax.sgd(0.1), train, **arguments)
  cached = fit(student, outputs, objective, optax.sgd(0.1), train, **arguments)
  np.testing.assert_allclose(
    cached.variables.params["w"], live.variables.params["w"], rtol=1e-4, atol=1e-5
  )
  again = cache.open_cache(tmp_path / "cache")
  assert again.digest == outputs.digest
  batch = again.add_columns(next(data.batches(train, 16, seed=0)))
  logits = again.decode("logits", batch)
  expected = batch["x"] @ teacher.variables.params["w"]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_cache_of_another_teacher_is_rejected(teacher, train, tmp_path):
  arguments = dict(outputs={"logits": cache.Dense("float32")}, progress=False)
  cache.write_cache(tmp_path / "cache", teacher, train, **arguments)
  other = jax.tree.map(lambda x: x + 1, teacher.variables)
  with pytest.raises(cache.Mismatch, match=r"teacher"):
    cache.write_cache(tmp_path / "cache", teacher, train, teacher_variables=other, **arguments)
  with pytest.raises(cache.Incomplete):
    cache.open_cache(tmp_path / "nothing")


def test_augmented_views_reach_teacher_and_student(student, teacher, train, objective):
  """`StepOptions.augment` runs before both networks, by ids and views."""

  def augment(batch):
    scale = 1.0 + 0.1 * batch["view"][:, None] + 0.0 * batch["id"][:, None]
    return {**batch, "x": batch["x"] * scale}

  options = dict(steps=12, batch_size=16)
  two = fit(
    student, teacher, objective, optax.sgd(0.1), train, step=StepOptions(augment=augment),
    run=RunOptions(num_views=2, progress=False), **options,
  )  # fmt: skip
  plain = fit(student, teacher, objective, optax.sgd(0.1), train, run=QUIET, **options)
  assert not np.array_equal(two.variables.params["w"], plain.variables.params["w"])
