"""Tests the recipes for Equinox and Haiku, and every library as teacher and as student."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_apply, from_keras, from_linen, from_nnx
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.student import export_student, load_student
from distill_jax.train import make_init, make_train_step
from distill_jax.types import Variables

eqx, hk, keras = (pytest.importorskip(name) for name in ("equinox", "haiku", "keras"))
KEY = jax.random.key(1)
WIDTH, CLASSES = 16, 3


class EquinoxNet(eqx.Module):
  """One example at a time, hence batch norm's axis name."""

  hidden: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  drop: eqx.nn.Dropout
  head: eqx.nn.Linear

  def __init__(self, key):
    first, second = jax.random.split(key)
    self.hidden = eqx.nn.Linear(6, WIDTH, key=first)
    self.norm = eqx.nn.BatchNorm(WIDTH, "batch", momentum=0.5, mode="batch")
    self.drop = eqx.nn.Dropout(0.2)
    self.head = eqx.nn.Linear(WIDTH, CLASSES, key=second)

  def __call__(self, x, state, key):
    x, state = self.norm(self.hidden(x), state)
    hidden = self.drop(jax.nn.relu(x), key=key)
    return {"logits": self.head(hidden), "hidden": hidden}, state


def from_equinox(Net):
  template, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
  code = eqx.filter(template, eqx.is_inexact_array, inverse=True)
  structure = jax.tree.structure(state)

  def leaves(state):
    return [jnp.asarray(leaf, leaf.dtype) for leaf in jax.tree.leaves(state)]

  def init(key, image):
    net, state = eqx.nn.make_with_state(Net)(key)
    return eqx.filter(net, eqx.is_inexact_array), leaves(state)

  def apply(params, image, *, state, train, key):
    net = eqx.nn.inference_mode(eqx.combine(params, code), not train)
    keys = None if key is None else jax.random.split(key, len(image))
    state = jax.tree.unflatten(structure, state)
    run = jax.vmap(net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
    outputs, state = run(image, state, keys)
    return outputs, leaves(state)

  return from_apply(init, apply)


class HaikuNet(hk.Module):
  def __call__(self, x, train):
    x = hk.BatchNorm(True, True, 0.5)(hk.Linear(WIDTH)(x), train)
    hidden = jax.nn.relu(x)
    if train:
      hidden = hk.dropout(hk.next_rng_key(), 0.2, hidden)
    return {"logits": hk.Linear(CLASSES)(hidden), "hidden": hidden}


def from_haiku(Net):
  net = hk.transform_with_state(lambda image, train: Net()(image, train))
  return from_apply(
    lambda key, image: net.init(key, image, True),
    lambda params, image, *, state, train, key: net.apply(params, state, key, image, train),
  )


class NNXNet(nnx.Module):
  def __init__(self, rngs):
    self.hidden, self.head = nnx.Linear(6, WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)
    self.norm, self.drop = (
      nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs),
      nnx.Dropout(0.2, rngs=rngs),
    )

  def __call__(self, x):
    hidden = self.drop(nnx.relu(self.norm(self.hidden(x))))
    return {"logits": self.head(hidden), "hidden": hidden}


class LinenNet(linen.Module):
  @linen.compact
  def __call__(self, x, train):
    x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(linen.Dense(WIDTH)(x))
    hidden = linen.Dropout(0.2, deterministic=not train)(linen.relu(x))
    return {"logits": linen.Dense(CLASSES)(hidden), "hidden": hidden}


def keras_net():
  x = keras.Input((6,))
  hidden = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(WIDTH)(x))
  hidden = keras.layers.Dropout(0.2)(keras.layers.ReLU()(hidden))
  return keras.Model(x, {"logits": keras.layers.Dense(CLASSES)(hidden), "hidden": hidden})


LIBRARIES = {
  "nnx": lambda: from_nnx(NNXNet),
  "linen": lambda: from_linen(LinenNet()),
  "keras": lambda: from_keras(keras_net),
  "equinox": lambda: from_equinox(EquinoxNet),
  "haiku": lambda: from_haiku(HaikuNet),
}


@pytest.fixture
def batch(rng):
  image = rng.normal(size=(32, 6)).astype(np.float32)
  return {"image": image, "label": (image[:, :CLASSES]).argmax(-1).astype(np.int32)}


def assert_same(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# The two recipes, against calling the libraries directly


@pytest.mark.parametrize("train", [True, False])
def test_equinox_equals_calling_the_module(batch, train):
  model = LIBRARIES["equinox"]()
  variables = model.init(KEY, batch)
  net, state = eqx.nn.make_with_state(EquinoxNet)(KEY)
  assert_same(variables.params.hidden.weight, net.hidden.weight, 0)
  net = eqx.tree_at(lambda n: n.drop, net, eqx.nn.Dropout(0.2, inference=not train))
  net = eqx.tree_at(lambda n: n.norm.inference, net, not train)

  @eqx.filter_jit
  def call(net, state):
    keys = jax.random.split(KEY, 32)
    run = jax.vmap(net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
    return run(batch["image"], state, keys)

  expected, expected_state = call(net, state)
  outputs, actual = jax.jit(lambda v: model.apply(*v, batch, train=train, key=KEY))(variables)
  assert_same(outputs, expected, 1e-5)
  assert_same(actual, jax.tree.leaves(expected_state), 1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_haiku_equals_calling_the_module(batch, train):
  model = LIBRARIES["haiku"]()
  variables = jax.jit(model.init)(KEY, batch)
  net = hk.transform_with_state(lambda x: HaikuNet()(x, train))
  if train:
    assert_same(tuple(variables), jax.jit(net.init)(KEY, batch["image"]), 0)
  expected = jax.jit(net.apply)(*variables, KEY, batch["image"])
  actual = jax.jit(lambda v: model.apply(*v, batch, train=train, key=KEY))(variables)
  assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("library", ["equinox", "haiku"])
def test_modes_keys_and_state(batch, library):
  model = LIBRARIES[library]()
  variables = model.init(KEY, batch)
  run = jax.jit(
    lambda train, key: model.apply(*variables, batch, train=train, key=key), static_argnums=0
  )
  first, new_state = run(True, jax.random.key(2))
  second, _ = run(True, jax.random.key(3))
  assert (first["hidden"] != second["hidden"]).any()
  evaluated, same_state = run(False, None)
  assert_same(evaluated, run(False, KEY)[0], 0)
  pairs = zip(jax.tree.leaves(new_state), jax.tree.leaves(variables.state), strict=True)
  moved = [bool((x != y).any()) for x, y in pairs]
  assert all(moved) and moved
  for state in (new_state, same_state):
    assert jax.tree.structure(state) == jax.tree.structure(variables.state)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, variables.state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


# Every library in both roles


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_is_a_teacher_and_a_student(batch, library, tmp_path):
  teacher, student = LIBRARIES[library](), LIBRARIES[library]()
  objective = objectives.weighted(
    soft=(1.0, objectives.logits(losses.kl_divergence, temperature=2.0)),
    hint=(0.1, objectives.features("hidden", "hidden", losses.hint)),
  )
  parts = student, teacher, objective, optax.adam(0.02)
  teacher_variables = teacher.init(jax.random.key(2), batch)
  before = jax.tree.map(np.array, teacher_variables)
  state = make_init(*parts)(KEY, batch)
  step = jax.jit(make_train_step(*parts), donate_argnums=0)
  values = []
  for _ in range(30):
    state, metrics = step(state, teacher_variables, batch)
    values.append({name: float(reduce.value(pair)) for name, pair in metrics.items()})
  for name in ("soft", "hint"):
    assert values[-1][name] < 0.7 * values[0][name]
  assert_same(before, teacher_variables, 0)

  with Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    assert_same(checkpoints.restore(state).params, state.params, 0)
  variables = Variables(state.params["student"], state.model_state["student"])
  folder = export_student(variables, tmp_path / "out", description={})
  again = load_student(folder, LIBRARIES[library](), batch)
  run = jax.jit(lambda v: student.apply(*v, batch, train=False, key=None)[0]["logits"])
  assert_same(run(variables), run(again), 0)
