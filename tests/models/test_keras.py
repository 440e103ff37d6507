"""Keras models as Models, against calling Keras itself."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

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
def test_it_equals_calling_the_model(batch, train):
  net = functional(rate=0.0)
  net.get_layer("norm").moving_mean.assign([0.3, 0.2, 0.1])
  model = from_keras(net)
  variables = model.init(KEY, batch)
  outputs, state = model.apply(*variables, batch, train=train, key=KEY)
  assert_same(net.get_layer("norm").moving_mean.value, [0.3, 0.2, 0.1])
  assert_same(outputs["logits"], net(batch["image"], training=train))
  assert_same(state["norm"]["moving_mean"], net.get_layer("norm").moving_mean.value)
  assert (np.asarray(state["norm"]["moving_mean"]) != np.float32([0.3, 0.2, 0.1])).any() == train


@pytest.mark.parametrize("make", [functional, lambda: functional()])
def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation(batch, make):
  model = from_keras(make)
  variables = model.init(KEY, batch)
  run = jax.jit(
    lambda train, key: model.apply(*variables, batch, train=train, key=key)[0], static_argnums=0
  )
  assert_same(run(True, jax.random.key(2)), run(True, jax.random.key(2)), 0)
  assert (run(True, jax.random.key(2))["logits"] != run(True, jax.random.key(3))["logits"]).any()
  assert_same(run(False, None), run(False, jax.random.key(3)), 0)
  with pytest.raises(ValueError, match="key must not be None"):
    run(True, None)


def test_two_dropouts_draw_differently():
  x = keras.Input((50,))
  net = keras.Model(
    x, {"logits": layers.Dropout(0.5, seed=1)(x), "b": layers.Dropout(0.5, seed=1)(x)}
  )
  model = from_keras(net)
  drawn, _ = model.apply(*model.init(KEY, ones(4, 50)), ones(4, 50), train=True, key=KEY)
  assert (drawn["logits"] != drawn["b"]).any()
  assert 0.3 < (drawn["b"] == 0).mean() < 0.7


def test_a_subclassed_model_is_in_the_mode_of_the_call():
  net = Subclassed()
  net(np.ones((2, 30), np.float32))
  model = from_keras(net)
  batch = {"image": np.arange(60, dtype=np.float32).reshape(2, 30)}
  variables = model.init(KEY, batch)
  trained, moved = model.apply(*variables, batch, train=True, key=KEY)
  evaluated, kept = model.apply(*variables, batch, train=False, key=None)
  assert_same(trained["logits"].mean(0), np.zeros(30), 1e-4)
  assert 0.2 < (trained["dropped"] == 0).mean() < 0.8
  assert_same(evaluated["dropped"], batch["image"], 0)
  assert_same(evaluated["logits"], batch["image"] / np.sqrt(1.001), 1e-4)
  assert_same(kept, variables.state, 0)
  assert all(
    (a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(variables.state))
  )


def test_what_comes_out_has_the_structure_of_what_went_in(batch):
  model = from_keras(functional)
  variables = model.init(KEY, batch)
  names = {name for name, _ in named_leaves(variables)}
  assert {"params/conv/kernel", "params/norm/gamma", "state/norm/moving_mean"} <= names
  assert not any("seed" in name for name in names)
  for train in (True, False):
    assert_one_structure(variables.state, model.apply(*variables, batch, train=train, key=KEY)[1])
  assert_one_structure(variables, jax.eval_shape(model.init, KEY, batch))


def test_the_user_s_arrays_survive_a_donated_state(batch):
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


def test_metrics_of_a_compiled_model_and_a_fitted_one_are_no_state(batch):
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


# Made from a key


def test_init_repeats_with_its_key():
  model = from_keras(automatic)
  first, again, other = (model.init(jax.random.key(i), ones(1, 4)) for i in (0, 0, 1))
  assert_same(first, again, 0)
  for a, b in zip(named_leaves(first), named_leaves(other)):
    assert a[0] == b[0] and ("kernel" not in a[0] or (a[1] != b[1]).any())
  assert model.variables is None


def test_names_do_not_depend_on_what_was_built_before():
  names = [named_leaves(from_keras(automatic).init(KEY, ones(1, 4)))[0][0]]
  layers.Dense(1), automatic()
  names.append(named_leaves(from_keras(automatic).init(KEY, ones(1, 4)))[0][0])
  assert names == ["params/sequential/dense/bias"] * 2


def test_adapting_leaves_the_host_s_randomness_and_keras_names_alone():
  last, before = layers.Dense(1).name, random.getstate()
  from_keras(automatic).init(KEY, ones(1, 4))
  assert random.getstate() == before
  number = int(last.rpartition("_")[2]) if "_" in last else 0
  assert layers.Dense(1).name == f"dense_{number + 1}"


def test_init_from_a_function_is_not_compiled():
  with pytest.raises(Exception, match="cannot be compiled"):
    jax.block_until_ready(jax.jit(lambda k: from_keras(automatic).init(k, ones(1, 4)))(KEY))


def test_trained_weights_go_back_into_keras(batch):
  model = from_keras(functional)
  variables = model.init(KEY, batch)
  _, state = model.apply(*variables, batch, train=True, key=KEY)
  trained = Variables(jax.tree.map(lambda x: x + 1, variables.params), state)
  expected = model.apply(*trained, batch, train=False, key=None)[0]["logits"]
  for given in (functional, functional()):
    net = to_keras(given, trained)
    assert_same(net(batch["image"], training=False), expected, 1e-5)
    assert given is functional or net is given
  with pytest.raises(ValueError, match="other names: .*conv/bias"):
    to_keras(automatic, trained)


# Features


@pytest.mark.parametrize("train", [True, False])
def test_features_by_layer_name(batch, train):
  net = functional()
  model = from_keras(net, features={"map": "relu", "last": "head"})
  plain = from_keras(net)
  variables = model.init(KEY, batch)
  assert_one_structure(variables, plain.init(KEY, batch))
  outputs, state = jax.jit(lambda v: model.apply(*v, batch, train=train, key=KEY))(variables)
  assert outputs.keys() == {"logits", "map", "last"}
  assert outputs["map"].shape == (6, 2, 2, 3) and (outputs["map"] >= 0).all()
  assert_same(outputs["last"], outputs["logits"], 0)
  expected, expected_state = plain.apply(*variables, batch, train=train, key=KEY)
  assert_same(outputs["logits"], expected["logits"], 1e-5)
  assert_same(state, expected_state, 1e-5)
  gradient = jax.grad(
    lambda p: (model.apply(p, variables.state, batch, train=train, key=KEY)[0]["map"] ** 2).sum()
  )(variables.params)
  assert (gradient["conv"]["kernel"] != 0).any() and (gradient["head"]["kernel"] == 0).all()


def test_an_unknown_layer_names_the_nearest():
  with pytest.raises(ValueError, match="no layer 'rely' to capture as 'x'; did you mean 'relu'"):
    from_keras(functional, features={"x": "rely"})


def test_the_output_is_the_one_of_this_model_s_call():
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


def test_a_layer_called_twice_has_no_single_output():
  x, layer = keras.Input((4,)), layers.Dense(4, name="twice")
  with pytest.raises(ValueError, match="'twice' has 2 outputs here"):
    from_keras(keras.Model(x, layer(layer(x))), features=["twice"])


def test_a_subclassed_model_has_no_features_to_capture():
  net = Subclassed()
  net(np.ones((2, 3), np.float32))
  with pytest.raises(ValueError, match="return a mapping from its call"):
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
def test_probabilities_are_no_logits(make):
  with pytest.raises(ValueError, match=r"ends in (softmax|sigmoid).*classifier_activation=None"):
    from_keras(make())


def dense_ending_two():
  return keras.Sequential([keras.Input((2,)), layers.Dense(2, activation="softmax")])


@pytest.mark.parametrize(
  "options", [{}, {"activation": None}, {"activation": "log_softmax"}, {"activation": "relu"}]
)
def test_what_is_no_probability_passes(options):
  from_keras(dense_ending(**options))


def test_probabilities_pass_under_another_name():
  net = dense_ending(activation="softmax")
  model = from_keras(net, output="probabilities")
  outputs, _ = model.apply(*model.variables, ones(2, 4), train=False, key=None)
  assert outputs.keys() == {"probabilities"}
  with pytest.raises(ValueError, match="ends in softmax"):
    from_keras(net, output="probabilities", features={"logits": net.layers[-1].name})


# keras.applications


def test_vgg16_without_its_head_gives_features():
  net = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
  model = from_keras(net, features={"b1": "block1_pool", "b3": "block3_conv3"}, output="map")
  batch = ones(2, 32, 32, 3)
  shapes = jax.eval_shape(
    lambda v: model.apply(*v, batch, train=False, key=None)[0], model.variables
  )
  assert {name: s.shape for name, s in shapes.items()} == {
    "b1": (2, 16, 16, 64),
    "b3": (2, 8, 8, 256),
    "map": (2, 1, 1, 512),
  }
  assert sum(leaf.size for leaf in jax.tree.leaves(model.variables.params)) == 14_714_688
  outputs = jax.jit(lambda v: model.apply(*v, batch, train=False, key=None)[0])(model.variables)
  assert_same(outputs["map"], net(batch["image"]), 1e-5)


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_vgg16_with_its_head_gives_logits_or_is_refused(activation):
  net = keras.applications.VGG16(
    weights=None, input_shape=(32, 32, 3), classes=7, classifier_activation=activation
  )
  if activation:
    with pytest.raises(
      ValueError, match="'predictions' ends in softmax.*classifier_activation=None"
    ):
      from_keras(net)
    return
  model = from_keras(net)
  outputs = jax.eval_shape(
    lambda v: model.apply(*v, ones(2, 32, 32, 3), train=False, key=None)[0], model.variables
  )
  assert outputs["logits"].shape == (2, 7)


# What is refused


def test_a_list_of_outputs_needs_names():
  x = keras.Input((4,))
  with pytest.raises(ValueError, match="returns a list of 2: name them"):
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
  with pytest.raises(ValueError, match="no entry 'shfit'; did you mean 'shift'"):
    from_keras(net, inputs=["image", "shfit"]).apply(*model.variables, batch, train=False, key=None)


def test_models_that_are_no_built_models():
  with pytest.raises(ValueError, match="has no variables yet"):
    from_keras(Subclassed())
  with pytest.raises(ValueError, match=r"a function \(\) -> keras.Model, got int"):
    from_keras(lambda: 3)


def test_two_variables_of_one_path():
  class Twins(keras.Model):
    def __init__(self):
      super().__init__(name="twins")
      self.a, self.b = layers.Dense(2, name="same"), layers.Dense(2, name="same")

    def call(self, x):
      return self.a(x) + self.b(x)

  net = Twins()
  net(np.ones((1, 2), np.float32))
  with pytest.raises(ValueError, match="path 'twins/same/bias': give the layers different names"):
    from_keras(net)


@pytest.mark.parametrize("backend", ["numpy", "tensorflow"])
def test_another_backend_is_refused(backend):
  code = "import distill_jax.models as m; m.from_nnx; m.from_keras"
  environment = {**os.environ, "KERAS_BACKEND": backend}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment
  )
  assert (
    "ImportError: from_keras needs Keras on the JAX backend: set KERAS_BACKEND=jax" in done.stderr
  )


def test_keras_is_imported_only_when_its_adapter_is_used():
  code = (
    "import sys; sys.modules['keras'] = None; from distill_jax.models import from_nnx, from_apply"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
