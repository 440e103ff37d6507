"""Tests teachers of more than one network: dtypes, caches, ensembles, moving averages."""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax import losses, objectives, teachers
from distill_jax.models import from_apply, from_linen, from_nnx
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.types import Model, Variables

KEY = jax.random.key(0)


class Normed(linen.Module):
  @linen.compact
  def __call__(self, x, train):
    x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
    return linen.Dense(3)(x), {"hidden": x}


def plain(kernel):
  return from_apply(None, lambda w, x: (x @ w, {"hidden": x}), variables=kernel)


def constant(z):
  """Returns a teacher with the same logits for every batch."""
  return from_apply(None, lambda w, x: w, variables=jnp.asarray(z))


def softmax64(z):
  e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.fixture
def batch(rng):
  return {"image": rng.normal(size=(5, 6)).astype(np.float32), "label": np.arange(5)}


def outputs_of(model, batch, variables=None):
  return model.apply(*(variables or model.variables), batch, train=False, key=None)[0]


# with_dtype


def test_teacher_computes_in_its_own_dtype(batch):
  collections = Normed().init(KEY, batch["image"], train=False)
  model = from_linen(Normed(), collections)
  half = teachers.with_dtype(model, dtype=jnp.bfloat16)
  for variables in (half.variables, half.init(KEY, batch)):
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
  outputs = outputs_of(half, batch)
  assert {name: x.dtype for name, x in outputs.items()} == dict.fromkeys(
    ["logits", "hidden"], jnp.bfloat16
  )
  expected = outputs_of(model, batch)["logits"]
  np.testing.assert_allclose(outputs["logits"].astype(jnp.float32), expected, atol=0.05)
  assert (outputs["logits"].astype(jnp.float32) != expected).any()
  assert jax.tree.leaves(collections)[0].dtype == jnp.float32


def test_with_dtype_casts_floats_and_keeps_integers(batch):
  seen = {}

  def apply(params, x, label, state):
    seen.update(x=x.dtype, label=label.dtype, count=state["count"].dtype, w=params.dtype)
    return x, {"count": state["count"] + 1}

  variables = jnp.ones(()), {"count": jnp.int32(3)}
  model = from_apply(lambda key, x, y: variables, apply, inputs=["image", "label"])
  half = teachers.with_dtype(model, dtype=jnp.float16)
  assert half.variables is None
  initial = half.init(KEY, batch)
  _, state = half.apply(*initial, batch, train=False, key=None)
  assert seen == {
    "x": jnp.float16,
    "label": batch["label"].dtype,
    "count": jnp.int32,
    "w": jnp.float16,
  }
  assert state == {"count": 4}


@pytest.mark.parametrize("dtype", [jnp.int8, bool])
def test_dtype_that_is_not_floating_raises(dtype):
  with pytest.raises(ValueError, match="^dtype: "):
    teachers.with_dtype(constant([1.0]), dtype=dtype)


# cached


def test_cached_outputs_are_those_of_the_batch(rng, batch):
  stored = {
    "teacher/logits": rng.normal(size=(5, 3)),
    "teacher/stage/block3": rng.normal(size=(5, 4)),
  }
  model = teachers.cached()
  assert model.init(KEY, batch) == model.variables == Variables({}, {})
  outputs, state = model.apply({}, {}, batch | stored, train=False, key=None)
  assert outputs.keys() == {"logits", "stage/block3"} and state == {}
  assert outputs["logits"] is stored["teacher/logits"]
  with pytest.raises(ValueError, match=r"^batch: .*\['image', 'label'\]"):
    model.apply({}, {}, batch, train=False, key=None)


# ensemble


@pytest.mark.parametrize("weights", [None, [1, 2, 0.5], [0, 0, 3]])
@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_ensemble_is_the_weighted_mean(rng, weights, mean):
  z = 4 * rng.normal(size=(3, 2, 4, 3)).astype(np.float32)
  model = teachers.ensemble([constant(x) for x in z], weights=weights, mean=mean)
  run = jax.jit(lambda: model.apply(*model.variables, {"image": z[0]}, train=False, key=None)[0])
  actual = run()["logits"]
  fractions = np.ones(3) / 3 if weights is None else np.asarray(weights) / np.sum(weights)
  if mean == "logits":
    expected = np.einsum("m,m...->...", fractions, z.astype(float))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
  else:
    expected = np.einsum("m,m...->...", fractions, softmax64(z))
    np.testing.assert_allclose(actual, np.log(expected), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(softmax64(actual), expected, rtol=1e-5)


def test_probabilities_are_averaged_in_log_space_and_in_float32():
  far = [[0.0, 200.0, -300.0]], [[0.0, 200.0, -280.0]]
  got = outputs_of(
    teachers.ensemble([constant(z) for z in far], mean="probabilities"), {"image": 0}
  )["logits"]
  expected = np.logaddexp(-500.0, -480.0) - np.log(2)  # e^-480 is no float32
  np.testing.assert_allclose(got[0], [-200, 0, expected], rtol=1e-6)
  half = [constant(jnp.full((1, 2), z, jnp.float16)) for z in (40000, 50000)]
  for mean in ("probabilities", "logits"):
    got = outputs_of(teachers.ensemble(half, mean=mean), {"image": 0})["logits"]
    assert got.dtype == jnp.float32 and np.isfinite(got).all()


def test_missing_classes_and_teachers_of_weight_zero():
  a, b, broken = (
    constant([[0.0, 1.0, -np.inf]]),
    constant([[0.0, -np.inf, -np.inf]]),
    constant([[np.nan] * 3]),
  )
  model = teachers.ensemble([a, b, broken], weights=[1, 1, 0], mean="probabilities")
  expected = (softmax64([0.0, 1.0, -np.inf]) + [1, 0, 0]) / 2
  np.testing.assert_allclose(
    softmax64(outputs_of(model, {"image": 0})["logits"][0]), expected, rtol=1e-6
  )
  geometric = teachers.ensemble([a, broken], weights=[1, 0], mean="logits")
  np.testing.assert_array_equal(outputs_of(geometric, {"image": 0})["logits"], [[0, 1, -np.inf]])


def test_an_ensemble_of_one_is_that_teacher(rng, batch):
  one = plain(rng.normal(size=(6, 3)).astype(np.float32))
  single = outputs_of(one, batch)["logits"]
  np.testing.assert_array_equal(
    outputs_of(teachers.ensemble([one], mean="logits"), batch)["logits"], single
  )
  mixed = outputs_of(teachers.ensemble([one], mean="probabilities"), batch)["logits"]
  np.testing.assert_allclose(softmax64(mixed), softmax64(single), rtol=1e-5)


def heads(z, kind, depth):
  """Returns a teacher with three heads, the same for every batch."""
  outputs = {"logits": z, "kind": kind, "depth": depth}
  return from_apply(None, lambda w, x: w, variables=jax.tree.map(jnp.asarray, outputs))


def test_each_named_head_is_averaged_in_its_own_way(rng):
  z, kind, depth = (4 * rng.normal(size=(2, 4, size)) for size in (3, 1, 1))
  members = [heads(*(x[i].astype(np.float32) for x in (z, kind, depth))) for i in range(2)]
  mean = {"logits": "probabilities", "kind": "sigmoid", "depth": "logits"}
  model = teachers.ensemble(members, weights=[1, 3], mean=mean)
  outputs = outputs_of(model, {"image": 0})
  weights = [0.25, 0.75]
  classes = np.einsum("m,m...->...", weights, softmax64(z))
  np.testing.assert_allclose(outputs["logits"], np.log(classes), rtol=1e-5)
  positive = np.einsum("m,m...->...", weights, 1 / (1 + np.exp(-kind)))
  np.testing.assert_allclose(
    outputs["kind"], np.log(positive / (1 - positive)), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    outputs["depth"], np.einsum("m,m...->...", weights, depth), rtol=1e-5, atol=1e-6
  )


def test_a_head_that_was_not_averaged_raises(rng, batch):
  z, kind = rng.normal(size=(2, 5, 3)).astype(np.float32)
  model = teachers.ensemble([heads(z, kind, kind)] * 2, mean="probabilities")
  student = {"logits": z, "kind": kind}
  term = objectives.logits(losses.kl_divergence, output="kind")
  with pytest.raises(ValueError, match=r"^kind: .*ensemble\(mean="):
    term.init(KEY, student, outputs_of(model, batch))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_softmax_of_one_logit_raises(shape):
  model = teachers.ensemble([constant(np.ones(shape, np.float32))] * 2, mean="probabilities")
  with pytest.raises(ValueError, match="^mean: .*'logits'"):
    outputs_of(model, {"image": 0})


@pytest.mark.parametrize("mean", ["median", {}, {"logits": "median"}, None, ["logits"]])
def test_unknown_means_raise(mean):
  with pytest.raises(ValueError, match="^mean: "):
    teachers.ensemble([constant([1.0])], mean=mean)


def test_members_keep_outputs_variables_and_mode(batch):
  a, b = from_linen(Normed()), from_nnx(lambda rngs: nnx.Linear(6, 3, rngs=rngs))
  model = teachers.ensemble([a, b], mean="logits")
  assert model.variables is None
  variables = model.init(KEY, batch)
  first = Variables(variables.params["0"], variables.state["0"])
  outputs, state = model.apply(*variables, batch, train=False, key=None)
  assert outputs.keys() == {"logits", "0/logits", "0/hidden", "1/logits"}
  np.testing.assert_allclose(outputs["0/hidden"], outputs_of(a, batch, first)["hidden"], rtol=1e-6)
  assert fingerprint(state) == fingerprint(variables.state)
  _, trained = model.apply(*variables, batch, train=True, key=KEY)
  assert fingerprint(trained) != fingerprint(variables.state)
  twins = teachers.ensemble([a, a], mean="logits").init(KEY, batch).params
  assert fingerprint(twins["0"]) != fingerprint(twins["1"])


def test_members_get_keys_of_their_own():
  noise = from_apply(None, lambda w, x, key: jax.random.normal(key, x.shape), variables=())
  model = teachers.ensemble([noise, noise], mean="logits")
  outputs, _ = model.apply(*model.variables, {"image": np.zeros((2, 3))}, train=True, key=KEY)
  assert (outputs["0/logits"] != outputs["1/logits"]).all()


def test_ensemble_of_frozen_members_is_frozen(rng, batch):
  kernels = rng.normal(size=(2, 6, 3)).astype(np.float32)
  model = teachers.ensemble([plain(k) for k in kernels], mean="logits")
  before = fingerprint(model.variables)
  assert fingerprint(model.init(KEY, batch)) == before
  np.testing.assert_allclose(
    outputs_of(model, batch)["logits"], batch["image"] @ kernels.mean(0), atol=1e-5
  )
  assert fingerprint(model.variables) == before
  half = teachers.ensemble([plain(kernels[0]), from_linen(Normed())], mean="logits")
  assert half.variables is None


@pytest.mark.parametrize(
  "weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1], []]
)
def test_invalid_weights_raise(weights):
  with pytest.raises(ValueError, match=r"^weights: "):
    teachers.ensemble([constant([1.0]), constant([1.0])], weights=weights, mean="logits")


def test_invalid_ensembles_raise(batch):
  with pytest.raises(ValueError, match="^models: "):
    teachers.ensemble([], mean="logits")
  with pytest.raises(ValueError, match=r"^models: .*\(1, 2\), \(1, 3\)"):
    outputs_of(
      teachers.ensemble([constant([[1.0, 2]]), constant([[1.0, 2, 3]])], mean="logits"), batch
    )
  silent = from_apply(None, lambda w, x: {"hidden": x}, variables=())
  with pytest.raises(ValueError, match=r"^models: .*\['hidden'\] of teacher 1"):
    outputs_of(teachers.ensemble([constant([[1.0]]), silent], mean="logits"), batch)


# moving average


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_invalid_decay_raises(decay):
  with pytest.raises(ValueError, match="^decay: "):
    teachers.moving_average(constant([1.0]), decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_average_of_weights_and_statistics(rng, batch, decay):
  model = teachers.moving_average(from_linen(Normed()), decay=decay)
  average = jax.jit(model.init)(KEY, batch)
  average = Variables(average.params, average.state | {"counters": {"n": jnp.int32(0)}})
  expected = jax.tree.map(lambda x: np.asarray(x, np.float64), average)
  ema_update = jax.jit(model.ema_update)

  def blend(a, b, d):
    # Integers are taken over.
    return np.asarray(b) if b.dtype == jnp.int32 else d * a + (1 - d) * np.asarray(b, np.float64)

  def sample(x, step):
    if x.dtype == jnp.int32:
      return jnp.int32(step + 7)
    return jnp.asarray(rng.normal(size=x.shape), x.dtype)

  for step in range(6):
    student = jax.tree.map(functools.partial(sample, step=step), average)
    average = ema_update(average, student, jnp.int32(step))
    d = min(decay, (1 + step) / (10 + step))
    expected = jax.tree.map(functools.partial(blend, d=d), expected, student)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), average, expected
  )
  counter = average.state["counters"]["n"]
  assert counter == 12 and counter.dtype == jnp.int32


def test_average_keeps_dtypes_keys_and_functions(batch):
  student = from_linen(Normed())
  model = teachers.moving_average(student)
  assert (model.init, model.apply, model.variables) == (student.init, student.apply, None)
  own = Variables({"w": jnp.ones(2, jnp.bfloat16)}, {"key": KEY, "flag": jnp.array(True)})
  current = Variables(
    {"w": jnp.zeros(2, jnp.bfloat16)}, {"key": jax.random.key(5), "flag": jnp.array(False)}
  )
  new = model.ema_update(own, current, jnp.int32(0))
  assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, own)
  np.testing.assert_allclose(new.params["w"].astype(jnp.float32), 0.1, rtol=0.02)
  assert new.state["key"] == jax.random.key(5) and not new.state["flag"]


def test_average_inside_another_teacher_raises():
  average = teachers.moving_average(constant([1.0]))
  with pytest.raises(ValueError, match="^model: "):
    teachers.with_dtype(average, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match="^models: .*1"):
    teachers.ensemble([constant([1.0]), average], mean="logits")


def test_every_teacher_is_a_model():
  models = [
    teachers.with_dtype(constant([1.0]), dtype=jnp.float16),
    teachers.cached(),
    teachers.ensemble([constant([1.0])], mean="logits"),
    teachers.moving_average(constant([1.0])),
  ]
  assert all(isinstance(model, Model) for model in models)
  assert [model.ema_update is not None for model in models] == [False, False, False, True]
