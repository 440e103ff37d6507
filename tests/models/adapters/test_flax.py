"""Tests NNX and Linen modules as Models: values, modes, random streams, state and variables."""

import dataclasses

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.errors import InvalidRngError
from flax_networks import (
  KEY,
  LIBRARIES,
  LinenNet,
  Net,
  Twice,
  assert_one_structure,
  assert_same,
  ones,
)

from distill_jax.models import from_apply, from_linen, from_nnx


class TwoDropouts(nnx.Module):
  def __init__(self, rngs: nnx.Rngs, shared: bool = False):
    stream = rngs.dropout if shared else rngs
    self.a, self.b = nnx.Dropout(0.5, rngs=stream), nnx.Dropout(0.5, rngs=stream)

  def __call__(self, x):
    return {"a": self.a(x), "b": self.b(x)}


class SharedStream(nnx.Module):
  """Samples twice from a stream that the module itself holds."""

  def __init__(self, rngs: nnx.Rngs):
    self.rngs = rngs

  def __call__(self, x):
    return {name: x * jax.random.bernoulli(self.rngs.noise(), shape=x.shape) for name in ("a", "b")}


@pytest.fixture(scope="module")
def batch():
  return {"image": np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)}


@pytest.fixture(scope="module", params=LIBRARIES)
def network(request, batch):
  """(model, variables, jitted apply) of one library."""
  model = LIBRARIES[request.param]()
  run = jax.jit(
    lambda v, train, key: model.apply(*v, batch, train=train, key=key), static_argnums=1
  )
  return model, jax.jit(model.init)(KEY, batch), run


# Values of the libraries


@pytest.mark.parametrize("train", [True, False])
def test_nnx_equals_calling_the_module(batch, train):
  module = Net(nnx.Rngs(0))
  module.block.batch_norm.mean[...] = jnp.full(4, 0.3)
  module.block.dropout.rate = module.block.attention.dropout_rate = 0.0
  model = from_nnx(module)
  variables = model.init(KEY, batch)
  outputs, state = jax.jit(lambda v: model.apply(*v, batch, train=train, key=KEY))(variables)
  (module.train if train else module.eval)()
  expected = nnx.jit(lambda module, x: module(x))(module, batch["image"])
  assert_same(outputs["logits"], expected, 1e-5)
  assert_same(state["block"]["batch_norm"]["mean"], module.block.batch_norm.mean[...])
  assert (state["block"]["batch_norm"]["mean"] != 0.3).any() == train


@pytest.mark.parametrize("train", [True, False])
def test_linen_equals_calling_the_module(batch, train, linen_variables):
  model = from_linen(LinenNet(), linen_variables)
  run = jax.jit(lambda v: model.apply(*v, batch, train=train, key=KEY))
  outputs, state = run(model.init(KEY, batch))

  @jax.jit
  def call(variables):
    rngs = {"dropout": jax.random.fold_in(KEY, 0)}
    mutable = ["batch_stats"] if train else []
    return LinenNet().apply(variables, batch["image"], train, rngs=rngs, mutable=mutable)

  expected, changed = call(linen_variables)
  assert_same(outputs["logits"], expected, 1e-5)
  assert_same(state, changed if train else {"batch_stats": linen_variables["batch_stats"]})


# Modes, keys and state


def test_mode_and_key_decide_on_dropout_and_state(network):
  _, variables, run = network
  before = jax.tree.map(np.array, variables)
  first, new_state = run(variables, True, jax.random.key(2))
  again, _ = run(variables, True, jax.random.key(2))
  other, _ = run(variables, True, jax.random.key(3))
  assert_same(first, again, 0)
  assert (first["logits"] != other["logits"]).any()
  evaluated, same_state = run(variables, False, None)
  assert_same(evaluated, run(variables, False, jax.random.key(3))[0], 0)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables.state, new_state)
  assert all(jax.tree.leaves(moved)) and jax.tree.leaves(moved)
  assert_same(variables.state, same_state, 0)
  assert_same(before, variables, 0)
  for state in (new_state, same_state):
    assert_one_structure(variables.state, state)


def test_calls_leave_the_users_module_unchanged(batch):
  module = Net(nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
  model = from_nnx(module)
  jax.jit(lambda v: model.apply(*v, batch, train=True, key=KEY))(model.variables)
  assert_same(before, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)), 0)


def test_init_repeats_with_its_key_and_can_be_traced(network, batch):
  model, first, _ = network
  init = jax.jit(model.init)
  assert_same(first, init(KEY, batch), 0)
  other = init(jax.random.key(2), batch)
  assert (first.params["head"]["kernel"] != other.params["head"]["kernel"]).any()
  assert_one_structure(first, jax.eval_shape(model.init, KEY, batch))
  assert model.variables is None


@pytest.fixture(scope="module")
def linen_variables(batch):
  init = jax.jit(lambda key: LinenNet().init(key, batch["image"], train=False))
  return init(KEY)


def test_users_arrays_survive_a_donated_state(batch, linen_variables):
  module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  collections = jax.tree.map(jnp.array, linen_variables)
  w = jnp.ones((4, 2))
  for model in (
    from_nnx(module),
    from_linen(LinenNet(), collections),
    from_apply(None, lambda w, x: x @ w, variables=w),
  ):
    for leaf in jax.tree.leaves(model.init(KEY, batch)):
      leaf.delete()
    for leaf in jax.tree.leaves((model.variables, model.init(KEY, batch))):
      assert not leaf.is_deleted()
  leaves = jax.tree.leaves((nnx.state(module, nnx.Param), collections, w))
  assert not any(leaf.is_deleted() for leaf in leaves)


def test_model_survives_the_users_donated_module(batch):
  module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  model = from_nnx(module)
  for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)):
    leaf.delete()
  model.apply(*model.init(KEY, batch), batch, train=False, key=None)


@pytest.mark.parametrize(
  "module",
  [TwoDropouts, lambda r: TwoDropouts(r, shared=True), SharedStream],
  ids=["separate", "shared", "held"],
)
@pytest.mark.parametrize("built", [True, False])
def test_two_layers_sample_differently(module, built):
  model = from_nnx(module(nnx.Rngs(0)) if built else module)
  run = jax.jit(
    lambda: model.apply(*model.init(KEY, ones(20, 5)), ones(20, 5), train=True, key=KEY)
  )
  outputs, _ = run()
  assert (outputs["a"] != outputs["b"]).any()
  assert 0.2 < (outputs["a"] == 0).mean() < 0.8


def test_adapter_leaves_the_users_streams_unchanged():
  module = SharedStream(nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.RngCount)))
  model = from_nnx(module)
  model.apply(*model.init(KEY, ones(2, 3)), ones(2, 3), train=True, key=KEY)
  assert_same(before, nnx.to_pure_dict(nnx.state(module, nnx.RngCount)), 0)


def test_vmapped_layers_sample_differently():
  class Stack(nnx.Module):
    def __init__(self, rngs):
      make = nnx.vmap(lambda r: nnx.Dropout(0.5, rngs=r))
      self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
      return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x).swapaxes(0, 1)

  model = from_nnx(Stack(nnx.Rngs(0)))
  variables = model.init(KEY, ones(9, 5))
  outputs, _ = jax.jit(lambda: model.apply(*variables, ones(9, 5), train=True, key=KEY))()
  assert len({np.asarray(outputs["logits"][:, i]).tobytes() for i in range(3)}) == 3


def test_linen_streams_sample_differently():
  class Noisy(linen.Module):
    @linen.compact
    def __call__(self, x, train):
      w = self.param("w", lambda key: jnp.ones(()))
      return {
        n: w * jax.random.normal(self.make_rng(n), x.shape) if train else x for n in ("a", "b")
      }

  model = from_linen(Noisy(), rngs=["a", "b"])
  variables = model.init(KEY, ones(2, 3))
  outputs, _ = model.apply(*variables, ones(2, 3), train=True, key=KEY)
  assert (outputs["a"] != outputs["b"]).all()
  with pytest.raises(ValueError, match=r"^rngs: .*'a'.*rngs=\('b', 'a'\)"):
    from_linen(Noisy(), rngs=["b"]).apply(*variables, ones(2, 3), train=True, key=KEY)


@pytest.mark.parametrize(
  "library, error", [("nnx", ValueError), ("linen", InvalidRngError)], ids=["nnx", "linen"]
)
def test_dropout_in_training_without_a_key_raises(batch, library, error):
  model = LIBRARIES[library]()
  run = lambda: model.apply(*model.init(KEY, batch), batch, train=True, key=None)  # noqa: E731
  with pytest.raises(error, match="key|dropout"):
    jax.eval_shape(run)


@pytest.mark.parametrize(
  "flag", ["train", "training", "is_training", "deterministic", "use_running_average"]
)
@pytest.mark.parametrize("kind", ["argument", "field"])
def test_every_name_of_the_mode_is_set(flag, kind):
  if kind == "argument":
    code = f"def __call__(self, x, *, {flag}): return x * self.param('w', lambda key: 1.0) * {flag}"
    scope = {}
    exec(code, scope)
    module = type("Flagged", (linen.Module,), {"__call__": linen.compact(scope["__call__"])})()
  else:

    def call(self, x):
      return x * self.param("w", lambda key: 1.0) * getattr(self, flag)

    body = {"__call__": linen.compact(call), "__annotations__": {flag: bool | None}, flag: None}
    module = type("Flagged", (linen.Module,), body)()
  model = from_linen(module)
  variables = model.init(KEY, ones(1, 1))
  inference = flag in ("deterministic", "use_running_average")
  for train in (True, False):
    value = model.apply(*variables, ones(1, 1), train=train, key=KEY)[0]["logits"]
    assert value == (train != inference)


def test_argument_that_sounds_like_the_mode_is_not_left_at_its_default():
  """It was: dropout and batch norms of such a network stood still in training."""

  class Flagged(linen.Module):
    @linen.compact
    def __call__(self, x, is_train=False):
      return x * self.param("w", lambda key: 1.0) * is_train

  with pytest.raises(ValueError, match="^module: .*'is_train'"):
    from_linen(Flagged())
  model = from_linen(Flagged(), call=lambda net, x, train: net(x, is_train=train))
  variables = model.init(KEY, ones(1, 1))
  assert model.apply(*variables, ones(1, 1), train=True, key=None)[0]["logits"] == 1


def test_field_that_is_no_mode_is_left_unchanged():
  class Configured(linen.Module):
    train: dict = dataclasses.field(default_factory=lambda: {"scale": 2.0})

    @linen.compact
    def __call__(self, x):
      return x * self.param("w", lambda key: self.train["scale"])

  model = from_linen(Configured())
  variables = model.init(KEY, ones(1, 1))
  assert model.apply(*variables, ones(1, 1), train=True, key=None)[0]["logits"] == 2


def test_call_reaches_a_mode_of_the_users_own():
  class Custom(nnx.Module):
    def __init__(self, rngs):
      self.kernel, self.noisy = nnx.Param(jnp.ones(())), False

    def score(self, x, train):
      return self.kernel * x * (2 if train else 1) * (5 if self.noisy else 1)

  class LinenCustom(linen.Module):
    @linen.compact
    def __call__(self, x, phase):
      return x * self.param("w", lambda key: 1.0) * (10 if phase == "fit" else 1)

  def call(module, x, train):
    module.noisy = train
    return module.score(x, train)

  custom = Custom(nnx.Rngs(0))
  for model in (
    from_nnx(custom, call=call),
    from_linen(LinenCustom(), call=lambda m, x, train: m(x, "fit" if train else "score")),
  ):
    variables = model.init(KEY, ones(1, 1))
    values = [
      model.apply(*variables, ones(1, 1), train=t, key=KEY)[0]["logits"] for t in (True, False)
    ]
    np.testing.assert_array_equal(np.ravel(values), [10, 1])
  assert custom.noisy is False


# Variables from elsewhere


def test_linen_takes_trained_variables_in_any_mapping(batch, linen_variables):
  for collections in (linen_variables, FrozenDict(linen_variables)):
    model = from_linen(LinenNet(), collections)
    variables = model.init(jax.random.key(9), batch)
    assert_same(variables.params, linen_variables["params"], 0)
    assert_same(model.variables.params, linen_variables["params"], 0)
    run = jax.eval_shape(lambda v, m=model: m.apply(*v, batch, train=True, key=KEY), variables)
    assert_one_structure(variables.state, run[1])


def test_linen_variables_without_params_raise(linen_variables):
  with pytest.raises(ValueError, match=r"variables: .*\['block', 'head'\]"):
    from_linen(LinenNet(), linen_variables["params"])


def test_twelve_layers_keep_their_order():
  class Deep(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.data([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])

    def __call__(self, x):
      for layer in self.layers:
        x = jnp.sin(layer(x))
      return x

  module = Deep(nnx.Rngs(0))
  batch = ones(2, 4)
  model = from_nnx(module, features=["layers/2", "layers/11"])
  variables = model.init(KEY, batch)
  # A copy of the tree, as a checkpoint restores it.
  restored = jax.tree.map(lambda v: v, variables)
  outputs, _ = jax.jit(lambda v: model.apply(*v, batch, train=False, key=None))(restored)
  assert_same(outputs["logits"], module(batch["image"]), 1e-5)
  assert_same(outputs["logits"], jnp.sin(outputs["layers/11"]), 1e-5)
  assert_same(variables.params["layers"][11]["kernel"], module.layers[11].kernel[...], 0)


def test_tied_weights_are_one_parameter():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      # The shift is an array that is no variable.
      self.embed, self.shift = nnx.Embed(7, 4, rngs=rngs), jnp.full(4, 0.5)
      self.again = self.embed

    def __call__(self, tokens):
      return self.again.attend(self.embed(tokens) + self.shift)

  module, batch = Tied(nnx.Rngs(0)), {"tokens": jnp.arange(3)}
  model = from_nnx(module, inputs="tokens")
  variables = model.init(KEY, batch)
  assert len(jax.tree.leaves(variables.params)) == 1

  def total(params):
    return model.apply(params, variables.state, batch, train=True, key=KEY)[0]["logits"].sum()

  expected = jax.jit(jax.grad(lambda e: ((e[:3] + 0.5) @ e.T).sum()))(module.embed.embedding[...])
  gradient = jax.jit(jax.grad(total))(variables.params)
  assert_same(jax.tree.leaves(gradient)[0], expected, 1e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_values_of_an_earlier_call_are_no_state():
  class Sowing(Twice):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "seen", x)
      return super().__call__(x)

  module = Sowing(nnx.Rngs(0))
  module(jnp.ones((3, 4)))
  model = from_nnx(module)
  variables = model.init(KEY, ones(2, 4))
  _, state = model.apply(*variables, ones(2, 4), train=True, key=KEY)
  assert variables.state == state == {}
  assert hasattr(module, "seen")


def test_function_that_returns_no_module_raises():
  with pytest.raises(ValueError, match=r"^module: .*int"):
    from_nnx(lambda rngs: 3)
