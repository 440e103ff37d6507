"""Tests the adapters for Equinox and Haiku, and every library as teacher and as student."""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import losses, models, objectives, reduce
from distill_jax.models import from_equinox, from_haiku, from_keras, from_linen, from_nnx
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


class HaikuNet(hk.Module):
  def __call__(self, x, train):
    x = hk.BatchNorm(True, True, 0.5)(hk.Linear(WIDTH)(x), train)
    hidden = jax.nn.relu(x)
    if train:
      hidden = hk.dropout(hk.next_rng_key(), 0.2, hidden)
    return {"logits": hk.Linear(CLASSES)(hidden), "hidden": hidden}


haiku_net = hk.transform_with_state(lambda image, train: HaikuNet()(image, train))


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
  "equinox": lambda: from_equinox(eqx.nn.make_with_state(EquinoxNet)),
  "haiku": lambda: from_haiku(haiku_net),
}


@pytest.fixture
def batch(rng):
  image = rng.normal(size=(32, 6)).astype(np.float32)
  return {"image": image, "label": (image[:, :CLASSES]).argmax(-1).astype(np.int32)}


def assert_same(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# The two adapters, against calling the libraries directly


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


def test_equinox_module_without_state(batch):
  net = eqx.nn.Sequential([eqx.nn.Linear(6, CLASSES, key=KEY), eqx.nn.Dropout(0.5)])
  model = from_equinox(net)
  expected = jax.vmap(eqx.nn.inference_mode(net))(batch["image"])
  outputs, state = model.apply(*model.variables, batch, train=False, key=None)
  assert_same(outputs, {"logits": expected})
  assert state == {}
  keys = jax.random.split(KEY, 32)
  expected = jax.vmap(lambda x, key: net(x, key=key))(batch["image"], keys)
  assert_same(model.apply(*model.variables, batch, train=True, key=KEY)[0], {"logits": expected})
  frozen = from_equinox(eqx.nn.inference_mode(net))
  outputs = [frozen.apply(*frozen.variables, batch, train=t, key=KEY)[0] for t in (True, False)]
  assert_same(*outputs, 0)


def test_equinox_module_keeps_its_default_key_without_one(batch):
  # Modules of equimo split their key in evaluation, too.
  class Keyed(eqx.Module):
    def __call__(self, x, key=jax.random.key(3)):  # noqa: B008
      return x.reshape(-1)[:2] + jax.random.normal(key, (2,))

  model = from_equinox(Keyed())

  def logits(key):
    return model.apply(*model.variables, batch, train=False, key=key)[0]["logits"]

  first = np.reshape(batch["image"], (len(batch["image"]), -1))[:, :2]
  noise = jax.random.normal(jax.random.key(3), (2,))
  np.testing.assert_allclose(logits(None), first + noise, atol=1e-6)
  assert (np.asarray(logits(KEY)) != np.asarray(logits(None))).all()


def test_equinox_module_with_its_state(batch):
  class Net(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __call__(self, x, y, state):
      return self.norm(x + y, state)

  make = eqx.nn.make_with_state(lambda: Net(eqx.nn.BatchNorm(6, "rows", mode="ema")))
  model = from_equinox(make(), inputs=("image", "image"))
  outputs, state = model.apply(*model.variables, batch, train=True, key=KEY)
  x = 2 * batch["image"]
  expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  assert_same(outputs["logits"], expected, 1e-5)
  evaluated, same = model.apply(model.variables.params, state, batch, train=False, key=None)
  assert_same(evaluated["logits"], expected, 1e-5)
  assert_same(same, state, 0)


def test_haiku_transforms_without_state(batch):
  def forward(x, is_training):
    x = hk.Linear(CLASSES)(x)
    return hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x

  net = hk.transform(forward)
  model = from_haiku(net)
  params, state = model.init(KEY, batch)
  assert_same(params, net.init(KEY, batch["image"], is_training=True), 0)
  for train in (True, False):
    expected = net.apply(params, KEY, batch["image"], is_training=train)
    actual = model.apply(params, state, batch, train=train, key=KEY)
    assert_same(actual, ({"logits": expected}, {}), 0)
  without_key = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(CLASSES)(x)))
  teacher = from_haiku(without_key, params)
  outputs, _ = teacher.apply(*teacher.variables, batch, train=False, key=None)
  assert_same(outputs["logits"], without_key.apply(params, batch["image"]), 0)


def two_axes():
  return eqx.nn.Sequential([eqx.nn.BatchNorm(6, name, mode="ema") for name in "ab"])


@pytest.mark.parametrize(
  ("make", "field"),
  [
    (lambda: from_equinox(EquinoxNet(KEY)), "module: .*make_with_state"),
    (lambda: from_equinox(EquinoxNet), "module: .*make_with_state"),
    (lambda: from_equinox(LinenNet()), "module: .*LinenNet.*from_linen"),
    (lambda: from_equinox(haiku_net), "module: .*from_haiku"),
    (lambda: from_equinox(lambda key: 3), "module: .*int"),
    (lambda: from_equinox(lambda: EquinoxNet(KEY)), "module: .*1 arguments"),
    (lambda: from_equinox(eqx.nn.make_with_state(two_axes)()), "module: .*axis_name"),
    (lambda: from_haiku(HaikuNet), "transformed: .*HaikuNet"),
    (lambda: from_haiku(EquinoxNet(KEY)), "transformed: .*from_equinox"),
    (lambda: from_haiku(haiku_net, {"params": {}}), r"variables: .*\(params, state\)"),
    (lambda: from_linen(EquinoxNet(KEY)), "module: .*from_equinox"),
    (lambda: from_nnx(haiku_net), "module: .*from_haiku"),
  ],
)
def test_networks_that_do_not_fit_raise(make, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    make()


@pytest.mark.parametrize(
  ("adapter", "module", "package"),
  [("from_equinox", "equinox", "equinox"), ("from_haiku", "haiku", "dm-haiku")],
)
def test_missing_package_is_named(monkeypatch, adapter, module, package):
  monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.delitem(sys.modules, f"distill_jax.models.adapters.{module}")
  with pytest.raises(ImportError, match=f"{adapter}.*pip install {package}"):
    getattr(models, adapter)


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
