"""Tests networks that `fit`, `evaluate` and `predict` take as they are, and their inputs."""

import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import cache, data, losses, models, objectives, tasks, teachers
from distill_jax.models import from_nnx
from distill_jax.models.networks import as_model
from distill_jax.train import (
  RunOptions,
  evaluate,
  fit,
  make_init,
  make_loss_fn,
  make_train_step,
  predict,
)
from distill_jax.types import Model, Variables

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4)).astype(np.float32)
SOURCE = data.Source({"x": X, "label": (X[:, 0] > 0).astype(np.int32)}, classes=2)
OBJECTIVE = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
LINEN = linen.Dense(2)
NNX = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
LINEN_VARIABLES = LINEN.init(jax.random.key(0), X)


def train(student, teacher, **options):
  options = dict(steps=2, batch_size=8, run=RunOptions(progress=False)) | options
  return fit(student, teacher, OBJECTIVE, optax.sgd(0.5), options.pop("source", SOURCE), **options)


def keras_net():
  keras = pytest.importorskip("keras")
  x = keras.Input((4,))
  return keras.Model(x, keras.layers.Dense(2)(x))


def equinox_net():
  return pytest.importorskip("equinox").nn.Linear(4, 2, key=jax.random.key(0))


def haiku_pair():
  hk = pytest.importorskip("haiku")
  net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(x)))
  return net, net.init(jax.random.key(0), X)


NETWORKS = {
  "nnx": (lambda: nnx.Linear(4, 2, rngs=nnx.Rngs(0)), lambda net: net(X)),
  "linen": (lambda: (LINEN, LINEN_VARIABLES), lambda net: net[0].apply(net[1], X)),
  "keras": (keras_net, lambda net: net(X)),
  "equinox": (equinox_net, lambda net: jax.vmap(net)(X)),
  "haiku": (haiku_pair, lambda net: net[0].apply(net[1], X)),
}


@pytest.mark.parametrize("library", NETWORKS)
def test_network_as_it_is_learns_and_teaches(library):
  make, call = NETWORKS[library]
  network = make()
  expected = np.asarray(call(network))
  np.testing.assert_allclose(predict(network, None, SOURCE)["logits"], expected, atol=1e-6)
  accuracy = (expected.argmax(-1) == SOURCE.arrays["label"]).mean()
  scores = evaluate(network, None, SOURCE, tasks.classification(), teacher=(network, None))
  assert scores["accuracy"] == pytest.approx(accuracy)
  assert scores["agreement"] == 1.0
  # It teaches itself: gradients of 0 show that both begin with its own weights.
  result = train(network, network)
  np.testing.assert_allclose(result.predict(SOURCE)["logits"], expected, atol=1e-6)
  assert result.history[-1]["soft"] == pytest.approx(0, abs=1e-6)
  assert isinstance(result.student, Model)
  np.testing.assert_allclose(call(network), expected, atol=0)


def test_linen_module_takes_variables_next_to_it():
  other = jax.tree.map(lambda x: x + 1, LINEN_VARIABLES)
  expected = LINEN.apply(other, X)
  for variables in (other, Variables(other["params"], {})):
    np.testing.assert_allclose(predict(LINEN, variables, SOURCE)["logits"], expected, atol=1e-6)
  result = train(LINEN, LINEN, student_variables=other, teacher_variables=other)
  np.testing.assert_allclose(result.predict({"x": X})["logits"], expected, atol=1e-5)
  with pytest.raises(ValueError, match="^teacher_variables: "):
    train(LINEN, LINEN)
  with pytest.raises(ValueError, match="^variables: "):
    predict(LINEN, None, SOURCE)


def test_first_batch_of_an_iterator_is_not_lost():
  batches = ({"x": X[i : i + 4]} for i in range(0, 16, 4))
  logits = predict((LINEN, LINEN_VARIABLES), None, batches)["logits"]
  np.testing.assert_allclose(logits, LINEN.apply(LINEN_VARIABLES, X), atol=1e-6)


class Two(nnx.Module):
  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, tokens, mask):
    return self.layer(tokens) * mask


class Optional(Two):
  def __call__(self, tokens, mask=None):
    return self.layer(tokens)


class LinenTwo(linen.Module):
  @linen.compact
  def __call__(self, tokens, mask, train):
    return linen.Dense(2)(tokens) * mask


class KeywordOnly(Two):
  def __call__(self, tokens, *, mask):
    return self.layer(tokens)


class Bare(nnx.Module):
  pass


BATCH = {"mask": X[:, :1], "tokens": X, "label": np.zeros(16), "id": np.arange(16)}


@pytest.mark.parametrize("make", [lambda: Two, lambda: Two(nnx.Rngs(0)), LinenTwo])
def test_inputs_follow_the_names_of_arguments(make):
  model = as_model("student", make(), [*BATCH, "teacher/logits"])
  variables = model.init(jax.random.key(0), BATCH)
  logits = model.apply(*variables, BATCH, train=False, key=None)[0]["logits"]
  (kernel,) = (x for x in jax.tree.leaves(variables.params) if x.ndim == 2)
  np.testing.assert_allclose(logits, X @ np.asarray(kernel) * X[:, :1], rtol=1e-5, atol=1e-6)


class ReadsBoxes(Two):
  def __call__(self, boxes):
    return self.layer(boxes)


@pytest.mark.parametrize(("network", "entry"), [(nnx.Linear, "pixels"), (ReadsBoxes, "boxes")])
def test_boxes_are_no_input_but_of_an_argument_with_their_name(network, entry):
  sizes = (4, 2) if network is nnx.Linear else ()
  batch = {"pixels": X, "boxes": -X, "crowd": X > 0, "label": np.zeros(16)}
  model = as_model("student", network(*sizes, rngs=nnx.Rngs(0)), batch)
  variables = model.init(jax.random.key(0), batch)
  (kernel,) = (x for x in jax.tree.leaves(variables.params) if x.ndim == 2)
  logits = model.apply(*variables, batch, train=False, key=None)[0]["logits"]
  np.testing.assert_allclose(logits, batch[entry] @ np.asarray(kernel), rtol=1e-5, atol=1e-6)


def test_keras_inputs_follow_their_names():
  keras = pytest.importorskip("keras")
  b, a = keras.Input((2,), name="b"), keras.Input((2,), name="a")
  net = keras.Model([b, a], 2 * b - a)
  batch = {"a": np.zeros((1, 2), np.float32), "b": np.ones((1, 2), np.float32), "label": X[:1]}
  model = as_model("student", net, batch)
  logits = model.apply(*model.variables, batch, train=False, key=None)[0]["logits"]
  np.testing.assert_array_equal(logits, [[2.0, 2.0]])
  with pytest.raises(ValueError, match=r"^teacher: .*from_keras\(network, inputs="):
    as_model("teacher", net, ["c", "b", "label"])


@pytest.mark.parametrize(
  ("network", "entries", "message"),
  [
    (lambda: nnx.Linear(4, 2, rngs=nnx.Rngs(0)), ["x", "mask"], r"from_nnx\(\w+, inputs='x'\)"),
    (lambda: Two(nnx.Rngs(0)), ["x", "label"], r"'mask'.*from_nnx\(.*call="),
    (lambda: Optional(nnx.Rngs(0)), ["tokens", "mask"], r"from_nnx\("),
    (lambda: KeywordOnly(nnx.Rngs(0)), ["tokens"], r"'mask'.*from_nnx\(.*call="),
    (Bare, ["x"], r"Bare.*from_nnx\(.*call="),
    (lambda: (LINEN, LINEN_VARIABLES), ["x", "y"], r"from_linen\("),
    (lambda: (LINEN, {"kernel": X}), ["x"], "params"),
    (lambda: linen.Dense, ["x"], "class Dense"),
    (lambda: (nnx.Linear(4, 2, rngs=nnx.Rngs(0)), {}), ["x"], "tuple"),
    (lambda: lambda rngs: Two(rngs), ["x"], "function.*from_nnx"),
    (lambda: None, ["x"], "NoneType"),
    (lambda: OBJECTIVE, ["x"], "Objective"),
    (equinox_net, ["y", "z"], r"from_equinox\("),
    (lambda: haiku_pair()[0], ["y", "z"], r"from_haiku\("),
  ],
)
def test_network_whose_inputs_are_unknown_raises(network, entries, message):
  with pytest.raises(ValueError, match=f"^student: .*{message}"):
    as_model("student", network(), entries)


@pytest.mark.parametrize(
  ("field", "network", "message"),
  [
    ("teacher", "folder", r"load_student.*open_cache\(folder\)"),
    ("student", pathlib.Path("folder"), "student_variables=.*load_student"),
    ("teacher", [LINEN, LINEN], r"2 networks.*teachers\.ensemble"),
    ("teacher", {"a": NNX, "b": NNX, "c": NNX}, r"3 networks.*teachers\.ensemble"),
    ("teacher", (from_nnx(NNX),), r"1 networks.*teachers\.ensemble"),
    ("student", [from_nnx(NNX), NNX], r"2 networks.*models\.cohort"),
  ],
)
def test_what_holds_networks_names_the_call(field, network, message):
  with pytest.raises(ValueError, match=f"^{field}: expected .*{message}"):
    as_model(field, network, ["x"])


def test_fit_names_the_argument():
  with pytest.raises(ValueError, match="^student: "):
    train(lambda rngs: Two(rngs), None)
  with pytest.raises(ValueError, match="^teacher: "):
    train(LINEN, Two(nnx.Rngs(0)))


def test_trained_student_teaches_as_a_model():
  result = train(LINEN, (LINEN, LINEN_VARIABLES))
  assert result.model.variables is result.variables
  taught = train(LINEN, result.model, student_variables=result.variables)
  assert taught.history[0]["soft"] < 1e-6
  with pytest.raises(ValueError, match=r"^teacher: .* FitResult: write \.model"):
    train(LINEN, result)


class Train(nnx.Module):
  def __call__(self, x, train: bool = False):
    return x * (1 + train)


class Deterministic(nnx.Module):
  def __call__(self, x, deterministic):
    return x * (2 - deterministic)


@pytest.mark.parametrize("make", [Train, Deterministic])
def test_mode_of_a_module_is_an_argument_of_its_call(make):
  for model in (from_nnx(make(), inputs="x"), as_model("student", make(), ["x"])):
    for train_mode, factor in ((True, 2), (False, 1)):
      outputs, _ = model.apply(*model.variables, {"x": X}, train=train_mode, key=None)
      np.testing.assert_array_equal(outputs["logits"], X * factor)


def test_cache_stores_a_network_as_it_is(tmp_path):
  pair = (LINEN, LINEN_VARIABLES)
  written = cache.write_cache(tmp_path, pair, SOURCE, progress=False)
  assert cache.verify(written, pair, SOURCE, 4)["logits"].top1 == 1.0
  result = train(LINEN, written, student_variables=LINEN_VARIABLES)
  assert result.history[-1]["soft"] == pytest.approx(0, abs=1e-4)  # float16
  with pytest.raises(ValueError, match=r"^teacher: .*from_nnx\("):
    cache.write_cache(tmp_path, Two(nnx.Rngs(0)), SOURCE)


@pytest.mark.parametrize(
  ("field", "call"),
  [
    (r"models\[1\]", lambda: models.cohort([from_nnx(NNX), NNX])),
    (r"models\[0\]", lambda: teachers.ensemble([NNX], mean="logits")),
    ("student", lambda: teachers.moving_average(NNX)),
    ("model", lambda: teachers.with_dtype(NNX, dtype="bfloat16")),
    ("student", lambda: make_loss_fn(NNX, None, OBJECTIVE)),
    ("teacher", lambda: make_train_step(from_nnx(NNX), NNX, OBJECTIVE, optax.sgd(1.0))),
    ("student", lambda: make_init(NNX, None, OBJECTIVE, optax.sgd(1.0))),
  ],
)
def test_functions_of_models_name_the_adapter(field, call):
  with pytest.raises(ValueError, match=f"^{field}: .*Linear.*from_nnx"):
    call()
