"""Tests Keras models as Models, against calling Keras itself."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import importlib
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models import from_keras, to_keras
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

keras = pytest.importorskip("keras")
layers = keras.layers
KEY = jax.random.key(1)


def functional(rate=0.5):
  image = keras.Input((4, 4, 1))
  x = layers.Conv2D(3, 3, name="conv")(image)
  x = layers.BatchNormalization(momentum=0.5, name="norm")(x)
  x = layers.Dropout(rate)(layers.ReLU(name="relu")(x))
  x = layers.Dropout(rate)(layers.Flatten()(x))
  return keras.Model(image, layers.Dense(2, name="head")(x))


def automatic():
  return keras.Sequential(
    [keras.Input((4,)), layers.Dense(3), layers.Dropout(0.5), layers.Dense(2)]
  )


class Subclassed(keras.Model):
  """No argument `training`: Keras passes the mode down by itself."""

  def __init__(self):
    super().__init__()
    self.drop, self.norm = layers.Dropout(0.5), layers.BatchNormalization(momentum=0.5)

  def call(self, x):
    return {"logits": self.norm(x), "dropped": self.drop(x)}


@pytest.fixture
def batch(rng):
  return {"image": rng.normal(size=(6, 4, 4, 1)).astype(np.float32)}


def ones(*shape):
  return {"image": np.ones(shape, np.float32)}


def assert_same(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def assert_one_structure(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)


@pytest.mark.parametrize("train", [True, False])
def test_outputs_and_state_equal_calling_the_model(batch, train):
  net = functional(rate=0.0)
  net.get_layer("norm").moving_mean.assign([0.3, 0.2, 0.1])
  model = from_keras(net)
  variables = model.init(KEY, batch)
  outputs, state = model.apply(*variables, batch, train=train, key=KEY)
  assert_same(net.get_layer("norm").moving_mean.value, [0.3, 0.2, 0.1])
  assert_same(outputs["logits"], net(batch["image"], training=train))
  assert_same(state["norm"]["moving_mean"], net.get_layer("norm").moving_mean.value)
  assert (np.asarray(state["norm"]["moving_mean"]) != np.float32([0.3, 0.2, 0.1])).any() == train


def test_dropout_depends_on_the_key_only_in_training(batch):
  model = from_keras(functional)
  variables = model.init(KEY, batch)
  run = jax.jit(
    lambda train, key: model.apply(*variables, batch, train=train, key=key)[0], static_argnums=0
  )
  assert_same(run(True, jax.random.key(2)), run(True, jax.random.key(2)), 0)
  assert (run(True, jax.random.key(2))["logits"] != run(True, jax.random.key(3))["logits"]).any()
  assert_same(run(False, None), run(False, jax.random.key(3)), 0)
  with pytest.raises(ValueError, match="^key: "):
    run(True, None)


def test_two_dropouts_sample_differently():
  x = keras.Input((50,))
  net = keras.Model(
    x, {"logits": layers.Dropout(0.5, seed=1)(x), "b": layers.Dropout(0.5, seed=1)(x)}
  )
  model = from_keras(net)
  outputs, _ = model.apply(*model.init(KEY, ones(4, 50)), ones(4, 50), train=True, key=KEY)
  assert (outputs["logits"] != outputs["b"]).any()
  assert 0.3 < (outputs["b"] == 0).mean() < 0.7


def test_subclassed_model_is_in_the_mode_of_the_call():
  net = Subclassed()
  net(np.ones((2, 30), np.float32))
  model = from_keras(net)
  batch = {"image": np.arange(60, dtype=np.float32).reshape(2, 30)}
  variables = model.init(KEY, batch)
  trained, moved = model.apply(*variables, batch, train=True, key=KEY)
  evaluated, state = model.apply(*variables, batch, train=False, key=None)
  assert_same(trained["logits"].mean(0), np.zeros(30), 1e-4)
  assert 0.2 < (trained["dropped"] == 0).mean() < 0.8
  assert_same(evaluated["dropped"], batch["image"], 0)
  assert_same(evaluated["logits"], batch["image"] / np.sqrt(1.001), 1e-4)
  assert_same(state, variables.state, 0)
  assert all(
    (a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(variables.state))
  )


def test_state_keeps_its_structure_and_names(batch):
  model = from_keras(functional)
  variables = model.init(KEY, batch)
  names = {name for name, _ in named_leaves(variables)}
  assert {"params/conv/kernel", "params/norm/gamma", "state/norm/moving_mean"} <= names
  assert not any("seed" in name for name in names)
  for train in (True, False):
    run = lambda v, t=train: model.apply(*v, batch, train=t, key=KEY)  # noqa: E731
    assert_one_structure(variables.state, jax.eval_shape(run, variables)[1])
  assert_one_structure(variables, jax.eval_shape(model.init, KEY, batch))


def test_users_arrays_survive_a_donated_state(batch):
  net = functional()
  model = from_keras(net)
  for leaf in jax.tree.leaves(model.init(KEY, batch)):
    leaf.delete()
  for leaf in jax.tree.leaves(
    (model.variables, model.init(KEY, batch), [v.value for v in net.variables])
  ):
    assert not leaf.is_deleted()
  for leaf in jax.tree.leaves(model.variables):
    leaf.delete()
  assert not any(v.value.is_deleted() for v in net.variables)


def test_metrics_of_a_fitted_model_are_no_state(batch):
  net = functional()
  before = {name for name, _ in named_leaves(from_keras(net).init(KEY, batch))}
  net.compile("adam", "mse", metrics=["mae"])
  net.fit(batch["image"], np.zeros((6, 2)), verbose=0)
  model = from_keras(net)
  assert {name for name, _ in named_leaves(model.init(KEY, batch))} == before
  assert_same(
    model.apply(*model.variables, batch, train=False, key=None)[0]["logits"],
    net(batch["image"]),
    1e-5,
  )


def test_frozen_layers_are_state(batch):
  net = functional()
  net.get_layer("conv").trainable = False
  variables = from_keras(net).init(KEY, batch)
  assert "conv" not in variables.params and variables.state["conv"].keys() == {"kernel", "bias"}


# Built from a key


def test_init_repeats_with_its_key():
  model = from_keras(automatic)
  first, again, other = (model.init(jax.random.key(i), ones(1, 4)) for i in (0, 0, 1))
  assert_same(first, again, 0)
  for a, b in zip(named_leaves(first), named_leaves(other)):
    assert a[0] == b[0] and ("kernel" not in a[0] or (a[1] != b[1]).any())
  assert model.variables is None


def test_names_do_not_depend_on_earlier_models():
  names = [named_leaves(from_keras(automatic).init(KEY, ones(1, 4)))[0][0]]
  layers.Dense(1), automatic()
  names.append(named_leaves(from_keras(automatic).init(KEY, ones(1, 4)))[0][0])
  assert names == ["params/sequential/dense/bias"] * 2


def test_adapter_keeps_the_hosts_randomness_and_keras_names():
  last, before = layers.Dense(1).name, random.getstate()
  from_keras(automatic).init(KEY, ones(1, 4))
  assert random.getstate() == before
  number = int(last.rpartition("_")[2]) if "_" in last else 0
  assert layers.Dense(1).name == f"dense_{number + 1}"


def test_init_in_a_compiled_function_raises():
  with pytest.raises(Exception, match="init: "):
    jax.block_until_ready(jax.jit(lambda k: from_keras(automatic).init(k, ones(1, 4)))(KEY))


def test_trained_weights_return_to_keras(batch):
  model = from_keras(functional)
  variables = model.init(KEY, batch)
  _, state = model.apply(*variables, batch, train=True, key=KEY)
  trained = Variables(jax.tree.map(lambda x: x + 1, variables.params), state)
  expected = model.apply(*trained, batch, train=False, key=None)[0]["logits"]
  for source in (functional, functional()):
    net = to_keras(source, trained)
    assert_same(net(batch["image"], training=False), expected, 1e-5)
    assert source is functional or net is source
  with pytest.raises(ValueError, match="variables: .*conv/bias"):
    to_keras(automatic, trained)


# Features


@pytest.mark.parametrize("train", [True, False])
def test_features_have_names_values_and_gradients(batch, train):
  net = functional()
  model = from_keras(net, features={"map": "relu", "last": "head"})
  plain = from_keras(net)
  variables = model.init(KEY, batch)
  assert_one_structure(variables, plain.init(KEY, batch))

  @jax.jit
  def run(params):
    def total(params):
      outputs, state = model.apply(params, variables.state, batch, train=train, key=KEY)
      return (outputs["map"] ** 2).sum(), (outputs, state)

    gradient, result = jax.grad(total, has_aux=True)(params)
    return gradient, result, plain.apply(params, variables.state, batch, train=train, key=KEY)

  gradient, (outputs, state), (expected, expected_state) = run(variables.params)
  assert outputs.keys() == {"logits", "map", "last"}
  assert outputs["map"].shape == (6, 2, 2, 3) and (outputs["map"] >= 0).all()
  assert_same(outputs["last"], outputs["logits"], 0)
  assert_same(outputs["logits"], expected["logits"], 1e-5)
  assert_same(state, expected_state, 1e-5)
  assert (gradient["conv"]["kernel"] != 0).any() and (gradient["head"]["kernel"] == 0).all()


def test_unknown_layer_names_the_nearest():
  with pytest.raises(ValueError, match="features: .*'x'.*'rely'; did you mean 'relu'"):
    from_keras(functional, features={"x": "rely"})


def test_feature_is_that_of_this_models_call():
  x, layer = keras.Input((4,)), layers.Dense(4, name="shared")
  first, second = keras.Model(x, layer(x)), keras.Model(x, layer(2 * x))
  net = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d"), layers.ReLU(name="r")])
  net.add(layers.Dense(2))
  for model, name, expected in (
    (first, "shared", lambda x: first(x)),
    (second, "shared", lambda x: second(x)),
    (net, "r", lambda x: np.maximum(net.layers[0](x), 0)),
  ):
    adapted = from_keras(model, features=[name])
    outputs, _ = adapted.apply(*adapted.variables, ones(2, 4), train=False, key=None)
    assert_same(outputs[name], expected(ones(2, 4)["image"]))


def test_feature_of_a_layer_called_twice_raises():
  x, layer = keras.Input((4,)), layers.Dense(4, name="twice")
  with pytest.raises(ValueError, match="features: .*'twice' with 2"):
    from_keras(keras.Model(x, layer(layer(x))), features=["twice"])


def test_features_of_a_subclassed_model_raise():
  net = Subclassed()
  net(np.ones((2, 3), np.float32))
  with pytest.raises(ValueError, match="^features: "):
    from_keras(net, features=["norm"])


# Probabilities


def dense_ending(*ending, **options):
  return keras.Sequential([keras.Input((4,)), layers.Dense(2, **options), *ending])


def applied(function):
  x = keras.Input((4,))
  return keras.Model(x, function(layers.Dense(2)(x)))


@pytest.mark.parametrize(
  "make",
  [
    lambda: dense_ending(activation="softmax"),
    lambda: dense_ending(activation="sigmoid"),
    lambda: dense_ending(layers.Softmax()),
    lambda: dense_ending(layers.Activation("softmax")),
    lambda: dense_ending(dense_ending_two()),
    lambda: applied(keras.ops.softmax),
    lambda: applied(lambda x: {"logits": layers.Softmax()(x)}),
  ],
)
def test_probabilities_as_logits_raise(make):
  with pytest.raises(ValueError, match=r"^output: .*(softmax|sigmoid)"):
    from_keras(make())


def dense_ending_two():
  return keras.Sequential([keras.Input((2,)), layers.Dense(2, activation="softmax")])


@pytest.mark.parametrize(
  "options", [{}, {"activation": None}, {"activation": "log_softmax"}, {"activation": "relu"}]
)
def test_activations_without_probabilities_pass(options):
  from_keras(dense_ending(**options))


def test_probabilities_pass_under_another_name():
  net = dense_ending(activation="softmax")
  model = from_keras(net, output="probabilities")
  outputs, _ = model.apply(*model.variables, ones(2, 4), train=False, key=None)
  assert outputs.keys() == {"probabilities"}
  with pytest.raises(ValueError, match="^output: .*softmax"):
    from_keras(net, output="probabilities", features={"logits": net.layers[-1].name})


# keras.applications


def test_network_of_keras_applications_gives_features():
  net = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), alpha=0.25, classes=7)
  with pytest.raises(ValueError, match="^output: .*'predictions'"):
    from_keras(net)
  features = {"early": "conv_pw_1_relu", "late": "conv_pw_13_relu"}
  model = from_keras(net, features=features, output="probabilities")
  outputs = jax.eval_shape(
    lambda v: model.apply(*v, ones(2, 32, 32, 3), train=False, key=None)[0], model.variables
  )
  assert {name: x.shape for name, x in outputs.items()} == {
    "early": (2, 16, 16, 16),
    "late": (2, 1, 1, 256),
    "probabilities": (2, 7),
  }


# Invalid models


def test_list_of_outputs_without_names_raises():
  x = keras.Input((4,))
  with pytest.raises(ValueError, match="^model: .*2"):
    from_keras(keras.Model(x, [layers.Dense(2)(x), layers.Dense(3)(x)]))


def test_several_inputs_and_a_missing_one(rng):
  a, b = keras.Input((4,)), keras.Input((2,))
  net = keras.Model([a, b], layers.Dense(2, name="d")(a) - 2 * b)
  batch = {
    "image": rng.normal(size=(3, 4)).astype(np.float32),
    "shift": np.ones((3, 2), np.float32),
  }
  model = from_keras(net, inputs=["image", "shift"])
  outputs, _ = model.apply(*model.variables, batch, train=False, key=None)
  layer = model.variables.params["d"]
  assert_same(outputs["logits"], batch["image"] @ layer["kernel"] + layer["bias"] - 2)
  with pytest.raises(ValueError, match="inputs: .*'shfit'; did you mean 'shift'"):
    from_keras(net, inputs=["image", "shfit"]).apply(*model.variables, batch, train=False, key=None)


def test_models_that_are_not_built_raise():
  with pytest.raises(ValueError, match="^model: "):
    from_keras(Subclassed())
  with pytest.raises(ValueError, match=r"^model: .*int"):
    from_keras(lambda: 3)


def test_two_variables_of_one_path_raise():
  class Twins(keras.Model):
    def __init__(self):
      super().__init__(name="twins")
      self.a, self.b = layers.Dense(2, name="same"), layers.Dense(2, name="same")

    def call(self, x):
      return self.a(x) + self.b(x)

  net = Twins()
  net(np.ones((1, 2), np.float32))
  with pytest.raises(ValueError, match="^model: .*'twins/same/bias'"):
    from_keras(net)


def test_other_backend_raises(monkeypatch):
  monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
  monkeypatch.delitem(sys.modules, "distill_jax.models.adapters.keras")
  with pytest.raises(ImportError, match="from_keras .*KERAS_BACKEND=jax.*numpy"):
    importlib.import_module("distill_jax.models.adapters.keras")


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["numpy", "tensorflow"])
def test_other_backends_raise_in_a_new_process(backend):
  code = "import distill_jax.models as m; m.from_nnx; m.from_keras"
  environment = {**os.environ, "KERAS_BACKEND": backend}
  process = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment
  )
  assert "ImportError: from_keras" in process.stderr and "KERAS_BACKEND=jax" in process.stderr


def test_keras_is_imported_only_when_its_adapter_is_used():
  code = (
    "import sys; sys.modules['keras'] = None; from distill_jax.models import from_nnx, from_apply"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
