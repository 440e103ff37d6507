"""Tests plain functions as Models, and what networks of any library take and return."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_networks import KEY, assert_same, ones

from distill_jax.models import from_apply, from_linen, from_nnx


@pytest.mark.parametrize(
  ("result", "names"),
  [
    (lambda x: x, {"logits"}),
    (lambda x: {"logits": x, "f": x}, {"logits", "f"}),
    (lambda x: {"embedding": x}, {"embedding"}),
    (lambda x: (x, {"f": x}), {"logits", "f"}),
  ],
)
def test_arrays_mappings_and_pairs_are_outputs(result, names):
  class Any(nnx.Module):
    def __call__(self, x):
      return result(x)

  class LinenAny(linen.Module):
    def __call__(self, x):
      return result(x)

  for model in (
    from_nnx(Any()),
    from_linen(LinenAny(), {"params": {}}),
    from_apply(lambda key, x: {}, lambda p, x: result(x)),
  ):
    outputs, _ = model.apply(*model.init(KEY, ones(2, 3)), ones(2, 3), train=False, key=None)
    assert outputs.keys() == names
    assert all(value.shape == (2, 3) for value in outputs.values())


@pytest.mark.parametrize(
  "result", [lambda x: [x], lambda x: (x, x), lambda x: (x, {}, x), lambda x: None]
)
def test_other_outputs_raise(result):
  model = from_apply(None, lambda p, x: result(x), variables={})
  with pytest.raises(ValueError, match="outputs"):
    model.apply({}, {}, ones(2, 3), train=False, key=None)


def test_init_in_the_place_of_apply_is_named():
  with pytest.raises(ValueError, match=r"^apply: .*from_apply\(init, apply\)"):
    from_apply(lambda params, x: x, lambda key, x: {})


class Bilinear(nnx.Module):
  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x, y):
    return self.layer(x) - 2 * y


class LinenBilinear(linen.Module):
  @linen.compact
  def __call__(self, x, y):
    return linen.Dense(2, name="layer")(x) - 2 * y


@pytest.mark.parametrize(
  "make",
  [
    lambda inputs: from_nnx(Bilinear, inputs=inputs),
    lambda inputs: from_linen(LinenBilinear(), inputs=inputs),
    lambda inputs: from_apply(
      lambda key, x, y: {"layer": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}},
      lambda p, x, y: x @ p["layer"]["kernel"] + p["layer"]["bias"] - 2 * y,
      inputs=inputs,
    ),
  ],
  ids=["nnx", "linen", "apply"],
)
def test_several_inputs_and_a_missing_one(rng, make):
  batch = {
    "image": rng.normal(size=(3, 4)).astype(np.float32),
    "shift": np.ones((3, 2), np.float32),
  }
  model = make(["image", "shift"])
  variables = model.init(KEY, batch)
  outputs, _ = model.apply(*variables, batch, train=False, key=None)
  layer = variables.params["layer"]
  assert_same(outputs["logits"], batch["image"] @ layer["kernel"] + layer["bias"] - 2)
  with pytest.raises(ValueError, match="inputs: .*'shfit'; did you mean 'shift'"):
    make(["image", "shfit"]).apply(*variables, batch, train=False, key=None)


def test_function_of_params(rng):
  w = rng.normal(size=(4, 2)).astype(np.float32)
  model = from_apply(lambda key, x: jax.random.normal(key, (x.shape[-1], 2)), lambda w, x: x @ w)
  assert_same(model.init(KEY, ones(3, 4)).params, jax.random.normal(KEY, (4, 2)), 0)
  outputs, state = model.apply(w, {}, ones(3, 4), train=True, key=None)
  assert_same(outputs["logits"], np.ones((3, 4)) @ w)
  assert state == {}
  trained = from_apply(None, lambda w, x: x @ w, variables=w)
  assert_same((trained.variables.params, trained.init(KEY, ones(3, 4)).params), (w, w), 0)


def test_function_gets_state_train_and_key_by_name():
  def apply(params, x, *, key, train, state):
    noise = jax.random.normal(key, x.shape) if train else 0
    return params * x + noise, {"calls": state["calls"] + train}

  variables = (jnp.float32(2), {"calls": jnp.int32(0)})
  for model in (
    from_apply(lambda key, x: variables, apply),
    from_apply(None, apply, variables=variables),
  ):
    initial = model.init(KEY, ones(2, 3))
    assert initial == variables
    outputs, state = model.apply(*initial, ones(2, 3), train=True, key=KEY)
    assert_same(outputs["logits"], 2 + jax.random.normal(KEY, (2, 3)))
    assert state == {"calls": 1}
    outputs, state = model.apply(*initial, ones(2, 3), train=False, key=None)
    assert (outputs["logits"] == 2).all() and state == {"calls": 0}


def test_results_that_are_no_pairs_raise():
  def apply(params, x, state):
    return x

  # Two rows would unpack into 'outputs' and 'state', and two keys into 'params' and 'state'.
  with pytest.raises(ValueError, match=r"^apply: "):
    from_apply(None, apply, variables=({}, {})).apply(
      {}, {}, {"image": jnp.ones((2, 3))}, train=False, key=None
    )
  with pytest.raises(ValueError, match=r"^variables: .*dict"):
    from_apply(None, apply, variables={"w": jnp.ones(2), "b": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"^variables: .*dict"):
    from_apply(lambda key, x: {"w": 1, "b": 2}, apply).init(KEY, ones(2, 3))


def test_neither_init_nor_variables_raises():
  with pytest.raises(ValueError, match="^init, variables: "):
    from_apply(None, lambda w, x: x).init(KEY, ones(2, 3))
