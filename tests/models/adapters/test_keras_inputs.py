"""Tests how a batch's entries reach the inputs of Keras models, and the losses that layers add."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
import pytest

from distill_jax.models import from_keras
from distill_jax.storage.stablehlo import export_stablehlo, load_stablehlo
from distill_jax.storage.student import export_student

keras = pytest.importorskip("keras")
KEY = jax.random.key(1)
BATCH = {"b": np.ones((1, 2), np.float32), "a": np.zeros((1, 2), np.float32)}


def difference(structure=dict, **options):
  """Returns the sum over 2 b - a, which is 4 for `BATCH` and -2 with its entries swapped."""
  b, a = keras.Input((2,), name="b"), keras.Input((2,), name="a")
  layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="d", **options)
  inputs = {"b": b, "a": a} if structure is dict else structure((b, a))
  return keras.Model(inputs, layer(2 * b - a))


def logits(model, batch=BATCH):
  return model.apply(*model.init(KEY, batch), batch, train=False, key=None)[0]["logits"]


@pytest.mark.parametrize("inputs", [("b", "a"), ("a", "b"), {"a": "a", "b": "b"}])
@pytest.mark.parametrize("features", [(), {"h": "d"}])
@pytest.mark.parametrize("structure", [dict, list])
def test_named_inputs_are_passed_by_name(structure, inputs, features):
  model = from_keras(difference(structure), inputs=inputs, features=features)
  np.testing.assert_array_equal(logits(model), [[4.0]])


def test_nested_model_gets_inputs_by_name():
  x, y = keras.Input((2,), name="x"), keras.Input((2,), name="y")
  outer = keras.Model({"x": x, "y": y}, difference()({"a": x, "b": y}))
  model = from_keras(outer, inputs={"x": "a", "y": "b"})
  np.testing.assert_array_equal(logits(model), [[4.0]])


def test_one_named_input_takes_any_entry():
  x = keras.Input((2,), name="x")
  layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
  for net in (keras.Model({"x": x}, layer(x)), keras.Model([x], layer(x))):
    np.testing.assert_array_equal(logits(from_keras(net, inputs="b")), [[2.0]])


@pytest.mark.parametrize("inputs", ["image", ("b", "image"), {"b": "b"}, ("a", "b", "c")])
def test_inputs_of_other_names_raise(inputs):
  with pytest.raises(ValueError, match=r"^inputs: .*\['b', 'a'\].*'a': "):
    from_keras(difference(), inputs=inputs)


class Subclassed(keras.Model):
  def __init__(self):
    super().__init__()
    self.layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")

  def call(self, b, a):
    return self.layer(2 * b - a)


class Named(Subclassed):
  def call(self, inputs):
    return self.layer(2 * inputs["b"] - inputs["a"])


def test_subclassed_models_take_call_or_a_mapping():
  net, named = Subclassed(), Named()
  net(BATCH["b"], BATCH["a"])
  named(BATCH)
  model = from_keras(net, inputs=("b", "a"), call=lambda m, b, a, train: m(b, a, training=train))
  np.testing.assert_array_equal(logits(model), [[4.0]])
  model = from_keras(named, inputs={"a": "a", "b": "b"})
  np.testing.assert_array_equal(logits(model), [[4.0]])
  with pytest.raises(ValueError, match="^features: "):
    from_keras(difference(), features=["d"], call=lambda m, *inputs, train: m(inputs))


def test_exported_program_goes_by_name(tmp_path):
  model = from_keras(difference(), inputs=("a", "b"))
  export_student(model.variables, tmp_path, description={})
  export_stablehlo(model, model.variables, BATCH, tmp_path, platforms=("cpu",))
  np.testing.assert_array_equal(load_stablehlo(tmp_path)(BATCH)["logits"], [[4.0]])


def test_losses_of_layers_are_an_output_in_training():
  model = from_keras(difference(kernel_regularizer=keras.regularizers.L2(0.25)), inputs=("a", "b"))
  outputs, _ = model.apply(*model.variables, BATCH, train=True, key=KEY)
  np.testing.assert_allclose(outputs["auxiliary_loss"], 0.25 * 2)  # Two weights of 1.
  assert "auxiliary_loss" not in model.apply(*model.variables, BATCH, train=False, key=None)[0]
