"""NNX modules, Linen modules and plain functions as Models, against calling the libraries directly."""

import dataclasses

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.errors import InvalidRngError

from distill_jax.models import from_apply, from_linen, from_nnx

KEY = jax.random.key(1)


class Block(nnx.Module):
  """Attention, layer norm, batch norm and dropout: what modes and states there are, nested."""

  def __init__(self, rngs: nnx.Rngs):
    self.attention = nnx.MultiHeadAttention(
      2, 4, dropout_rate=0.5, decode=False, rngs=rngs, broadcast_dropout=False
    )
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.batch_norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.batch_norm(self.norm(x + self.attention(x))))


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.block = Block(rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.block(x).mean(1))


class TwoDropouts(nnx.Module):
  def __init__(self, rngs: nnx.Rngs, shared: bool = False):
    stream = rngs.dropout if shared else rngs
    self.a, self.b = nnx.Dropout(0.5, rngs=stream), nnx.Dropout(0.5, rngs=stream)

  def __call__(self, x):
    return {"a": self.a(x), "b": self.b(x)}


class SharedStream(nnx.Module):
  """Two draws from one stream that the module itself holds."""

  def __init__(self, rngs: nnx.Rngs):
    self.rngs = rngs

  def __call__(self, x):
    return {name: x * jax.random.bernoulli(self.rngs.noise(), shape=x.shape) for name in ("a", "b")}


class LinenBlock(linen.Module):
  """A nested Linen network whose mode is an argument called `train`."""

  @linen.compact
  def __call__(self, x, train):
    x = linen.LayerNorm()(x + linen.MultiHeadDotProductAttention(2)(x))
    x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
    return linen.Dropout(0.5, deterministic=not train)(x)


class LinenNet(linen.Module):
  @linen.compact
  def __call__(self, x, train):
    return linen.Dense(2, name="head")(LinenBlock(name="block")(x, train).mean(1))


class Twice(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.layer = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    return self.layer(jnp.sin(self.layer(x)))


class LinenTwice(linen.Module):
  @linen.compact
  def __call__(self, x):
    layer = linen.Dense(4, name="layer")
    return layer(jnp.sin(layer(x)))


@pytest.fixture
def batch(rng):
  return {"image": rng.normal(size=(6, 3, 4)).astype(np.float32)}


def ones(*shape):
  return {"image": np.ones(shape, np.float32)}


def assert_same(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def assert_one_structure(a, b):
  """A scan or a donated buffer needs the same tree, shapes and dtypes on both sides."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)


def models(features=()):
  return {
    "nnx": from_nnx(Net, features=features),
    "linen": from_linen(LinenNet(), features=features),
  }


@pytest.fixture(params=["nnx", "linen"])
def library(request):
  return request.param


# Equal to the libraries


@pytest.mark.parametrize("train", [True, False])
def test_nnx_equals_calling_the_module(batch, train):
  module = Net(nnx.Rngs(0))
  module.block.batch_norm.mean[...] = jnp.full(4, 0.3)
  module.block.dropout.rate = module.block.attention.dropout_rate = 0.0
  model = from_nnx(module)
  variables = model.init(KEY, batch)
  outputs, state = model.apply(*variables, batch, train=train, key=KEY)
  (module.train if train else module.eval)()
  assert_same(outputs["logits"], module(batch["image"]))
  assert_same(state["block"]["batch_norm"]["mean"], module.block.batch_norm.mean[...])
  assert (state["block"]["batch_norm"]["mean"] != 0.3).any() == train


@pytest.mark.parametrize("train", [True, False])
def test_linen_equals_calling_the_module(batch, train):
  streams = {"params": KEY, "dropout": KEY}
  given = LinenNet().init(streams, batch["image"], train=False)
  model = from_linen(LinenNet(), given)
  outputs, state = model.apply(*model.init(KEY, batch), batch, train=train, key=KEY)
  expected, changed = LinenNet().apply(
    given,
    batch["image"],
    train,
    rngs={"dropout": jax.random.fold_in(KEY, 0)},
    mutable=["batch_stats"] if train else [],
  )
  assert_same(outputs["logits"], expected)
  assert_same(state, changed if train else {"batch_stats": given["batch_stats"]})


# Modes, keys and state


def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation(batch, library):
  model = models()[library]
  variables = model.init(KEY, batch)

  def logits(train, key):
    return model.apply(*variables, batch, train=train, key=key)[0]["logits"]

  assert_same(logits(True, jax.random.key(2)), logits(True, jax.random.key(2)), 0)
  assert (logits(True, jax.random.key(2)) != logits(True, jax.random.key(3))).any()
  assert_same(logits(False, None), logits(False, jax.random.key(3)), 0)


def test_batch_statistics_move_in_training_alone_and_only_in_what_is_returned(batch, library):
  module = Net(nnx.Rngs(0))
  model = {"nnx": from_nnx(module), "linen": models()["linen"]}[library]
  variables = model.init(KEY, batch)
  before = jax.tree.map(np.array, (variables, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))
  _, trained = model.apply(*variables, batch, train=True, key=KEY)
  _, evaluated = model.apply(*variables, batch, train=False, key=None)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables.state, trained)
  assert all(jax.tree.leaves(moved)) and jax.tree.leaves(moved)
  assert_same(variables.state, evaluated, 0)
  assert_same(before, (variables, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))), 0)


def test_what_comes_out_has_the_structure_of_what_went_in(batch, library):
  model = models()[library]
  variables = model.init(KEY, batch)
  for train in (True, False):
    _, state = model.apply(*variables, batch, train=train, key=KEY)
    assert_one_structure(variables.state, state)


def test_init_repeats_with_its_key_and_can_be_traced(batch, library):
  model = models()[library]
  first, again, other = (model.init(jax.random.key(i), batch) for i in (0, 0, 1))
  assert_same(first, again, 0)
  assert (first.params["head"]["kernel"] != other.params["head"]["kernel"]).any()
  assert_one_structure(first, jax.eval_shape(model.init, KEY, batch))
  assert model.variables is None


def test_the_user_s_arrays_survive_a_donated_state(batch):
  module, given = (
    Net(nnx.Rngs(0)),
    jax.tree.map(jnp.asarray, LinenNet().init(KEY, batch["image"], False)),
  )
  w = jnp.ones((4, 2))
  for model in (
    from_nnx(module),
    from_linen(LinenNet(), given),
    from_apply(None, lambda w, x: x @ w, variables=w),
  ):
    deleted = model.init(KEY, batch)
    for leaf in jax.tree.leaves(deleted):
      leaf.delete()
    for leaf in jax.tree.leaves((model.variables, model.init(KEY, batch))):
      assert not leaf.is_deleted()
  assert not any(
    leaf.is_deleted() for leaf in jax.tree.leaves((nnx.state(module, nnx.Param), given, w))
  )


@pytest.mark.parametrize(
  "module",
  [TwoDropouts, lambda r: TwoDropouts(r, shared=True), SharedStream],
  ids=["own", "shared", "held"],
)
@pytest.mark.parametrize("made", [True, False])
def test_two_draws_differ(module, made):
  model = from_nnx(module(nnx.Rngs(0)) if made else module)
  drawn, _ = model.apply(*model.init(KEY, ones(20, 5)), ones(20, 5), train=True, key=KEY)
  assert (drawn["a"] != drawn["b"]).any()
  assert 0.2 < (drawn["a"] == 0).mean() < 0.8


def test_adapting_draws_nothing_from_the_user_s_streams():
  module = SharedStream(nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.RngCount)))
  model = from_nnx(module)
  model.apply(*model.init(KEY, ones(2, 3)), ones(2, 3), train=True, key=KEY)
  assert_same(before, nnx.to_pure_dict(nnx.state(module, nnx.RngCount)), 0)


def test_vmapped_layers_draw_differently():
  class Stack(nnx.Module):
    def __init__(self, rngs):
      make = nnx.vmap(lambda r: nnx.Dropout(0.5, rngs=r))
      self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
      return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x).swapaxes(0, 1)

  model = from_nnx(Stack(nnx.Rngs(0)))
  drawn = model.apply(*model.init(KEY, ones(9, 5)), ones(9, 5), train=True, key=KEY)[0]["logits"]
  assert len({np.asarray(drawn[:, i]).tobytes() for i in range(3)}) == 3


def test_several_linen_streams_differ():
  class Noisy(linen.Module):
    @linen.compact
    def __call__(self, x, train):
      w = self.param("w", lambda key: jnp.ones(()))
      return {
        n: w * jax.random.normal(self.make_rng(n), x.shape) if train else x for n in ("a", "b")
      }

  model = from_linen(Noisy(), rngs=["a", "b"])
  variables = model.init(KEY, ones(2, 3))
  drawn, _ = model.apply(*variables, ones(2, 3), train=True, key=KEY)
  assert (drawn["a"] != drawn["b"]).all()
  with pytest.raises(InvalidRngError, match="a"):
    from_linen(Noisy(), rngs=["b"]).apply(*variables, ones(2, 3), train=True, key=KEY)


def test_training_with_dropout_needs_a_key(batch):
  model = from_nnx(Net)
  with pytest.raises(ValueError, match="key must not be None"):
    model.apply(*model.init(KEY, batch), batch, train=True, key=None)
  model = from_linen(LinenNet())
  with pytest.raises(InvalidRngError, match="dropout"):
    model.apply(*model.init(KEY, batch), batch, train=True, key=None)


@pytest.mark.parametrize(
  "flag", ["train", "training", "is_training", "deterministic", "use_running_average"]
)
@pytest.mark.parametrize("place", ["argument", "field"])
def test_every_name_of_the_mode_is_set(flag, place):
  if place == "argument":
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


def test_later_changes_of_the_module_reach_no_model(batch):
  module = Net(nnx.Rngs(0))
  model = from_nnx(module)
  for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)):
    leaf.delete()  # what a donating train step of the user's own does
  model.apply(*model.init(KEY, batch), batch, train=False, key=None)


def test_a_field_that_is_no_mode_is_left_alone():
  class Configured(linen.Module):
    train: dict = dataclasses.field(default_factory=lambda: {"scale": 2.0})

    @linen.compact
    def __call__(self, x):
      return x * self.param("w", lambda key: self.train["scale"])

  model = from_linen(Configured())
  assert (
    model.apply(*model.init(KEY, ones(1, 1)), ones(1, 1), train=True, key=None)[0]["logits"] == 2
  )


def test_call_reaches_a_mode_of_the_module_s_own():
  class Own(nnx.Module):
    def __init__(self, rngs):
      self.kernel, self.noisy = nnx.Param(jnp.ones(())), False

    def score(self, x, train):
      return self.kernel * x * (2 if train else 1) * (5 if self.noisy else 1)

  class LinenOwn(linen.Module):
    @linen.compact
    def __call__(self, x, phase):
      return x * self.param("w", lambda key: 1.0) * (10 if phase == "fit" else 1)

  def call(module, x, train):
    module.noisy = train
    return module.score(x, train)

  own = Own(nnx.Rngs(0))
  for model in (
    from_nnx(own, call=call),
    from_linen(LinenOwn(), call=lambda m, x, train: m(x, "fit" if train else "score")),
  ):
    variables = model.init(KEY, ones(1, 1))
    values = [
      model.apply(*variables, ones(1, 1), train=t, key=KEY)[0]["logits"] for t in (True, False)
    ]
    np.testing.assert_array_equal(np.ravel(values), [10, 1])
  assert own.noisy is False


# Variables that came from elsewhere


def test_linen_variables_are_used_whatever_holds_them(batch):
  given = LinenNet().init(KEY, batch["image"], train=False)
  plain, frozen = from_linen(LinenNet(), given), from_linen(LinenNet(), FrozenDict(given))
  for model in (plain, frozen):
    variables = model.init(jax.random.key(9), batch)
    assert_same(variables.params, given["params"], 0)
    assert_same(model.variables.params, given["params"], 0)
    _, state = model.apply(*variables, batch, train=True, key=KEY)
    assert_one_structure(variables.state, state)


def test_linen_variables_without_params_are_refused(batch):
  given = LinenNet().init(KEY, batch["image"], train=False)
  with pytest.raises(ValueError, match=r"no collection 'params'.*\['block', 'head'\]"):
    from_linen(LinenNet(), given["params"])


def test_twelve_layers_keep_their_order():
  class Deep(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List(nnx.Linear(4, 4, rngs=rngs) for _ in range(12))

    def __call__(self, x):
      for layer in self.layers:
        x = jnp.sin(layer(x))
      return x

  module, x = Deep(nnx.Rngs(0)), np.ones((2, 4), np.float32)
  model = from_nnx(module, features=["layers/2", "layers/11"])
  variables = model.init(KEY, {"image": x})
  outputs, _ = model.apply(
    *jax.tree.map(lambda v: v, variables), {"image": x}, train=False, key=None
  )
  assert_same(outputs["logits"], module(x))
  assert_same(outputs["logits"], jnp.sin(outputs["layers/11"]))
  assert_same(variables.params["layers"][11]["kernel"], module.layers[11].kernel[...], 0)


def test_tied_weights_and_arrays_that_are_no_variables():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.embed, self.shift = nnx.Embed(7, 4, rngs=rngs), jnp.full(4, 0.5)
      self.again = self.embed

    def __call__(self, tokens):
      return self.again.attend(self.embed(tokens) + self.shift)

  module, batch = Tied(nnx.Rngs(0)), {"tokens": jnp.arange(3)}
  model = from_nnx(module, inputs="tokens")
  variables = model.init(KEY, batch)
  assert len(jax.tree.leaves(variables.params)) == 1
  gradient = jax.grad(
    lambda p: model.apply(p, variables.state, batch, train=True, key=KEY)[0]["logits"].sum()
  )
  expected = jax.grad(lambda e: ((e[:3] + 0.5) @ e.T).sum())(module.embed.embedding[...])
  assert_same(jax.tree.leaves(gradient(variables.params))[0], expected, 1e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_values_left_by_an_earlier_call_are_no_state():
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


# Captured features


@pytest.mark.parametrize("train", [True, False])
def test_features_are_captured_under_their_names(batch, library, train):
  model = models(
    {"norm": "block/" + {"nnx": "norm", "linen": "LayerNorm_0"}[library], "out": "block"}
  )[library]
  variables = model.init(KEY, batch)

  def run(params):
    return model.apply(params, variables.state, batch, train=train, key=KEY)[0]

  eager, jitted = run(variables.params), jax.jit(run)(variables.params)
  assert eager.keys() == {"logits", "norm", "out"}
  assert_same(eager, jitted, 1e-5)
  head = variables.params["head"]
  assert_same(eager["logits"], eager["out"].mean(1) @ head["kernel"] + head["bias"], 1e-5)
  np.testing.assert_allclose(eager["norm"].mean(-1), 0, atol=1e-5)
  gradient = jax.grad(lambda p: (run(p)["norm"] ** 2 * jnp.arange(4)).sum())(variables.params)[
    "block"
  ]
  attention = gradient["attention" if library == "nnx" else "MultiHeadDotProductAttention_0"]
  assert any((leaf != 0).any() for leaf in jax.tree.leaves(attention))


@pytest.mark.parametrize(
  "make", [lambda **k: from_nnx(Twice, **k), lambda **k: from_linen(LinenTwice(), **k)]
)
def test_a_submodule_that_runs_twice_has_numbered_outputs(make):
  model = make(features={"first": "layer:0", "second": "layer:1", "all": ""})
  batch = ones(2, 4)
  variables = model.init(KEY, batch)
  outputs, _ = model.apply(*variables, batch, train=False, key=None)
  layer = variables.params["layer"]
  assert_same(outputs["first"], batch["image"] @ layer["kernel"] + layer["bias"])
  assert_same(outputs["second"], outputs["logits"], 0)
  assert_same(outputs["all"], outputs["logits"], 0)
  with pytest.raises(ValueError, match="no submodule output 'layer' .*'layer:"):
    make(features=["layer"]).apply(*variables, batch, train=False, key=None)


def test_an_unknown_path_names_the_nearest(batch, library):
  model = models({"x": "block/norm_"})[library]
  nearest = {"nnx": "block/norm", "linen": "block/LayerNorm_0"}[library]
  with pytest.raises(ValueError, match=f"'block/norm_' to capture as 'x'.*'{nearest}'"):
    model.apply(*model.init(KEY, batch), batch, train=False, key=None)


# What networks return and take


@pytest.mark.parametrize(
  ("result", "names"),
  [
    (lambda x: x, {"logits"}),
    (lambda x: {"logits": x, "f": x}, {"logits", "f"}),
    (lambda x: {"embedding": x}, {"embedding"}),
    (lambda x: (x, {"f": x}), {"logits", "f"}),
  ],
)
def test_the_three_shapes_of_outputs(result, names):
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
def test_other_outputs_are_refused(result):
  model = from_apply(None, lambda p, x: result(x), variables={})
  with pytest.raises(ValueError, match="must return logits, a mapping"):
    model.apply({}, {}, ones(2, 3), train=False, key=None)


def test_a_factory_that_makes_no_module_is_refused():
  with pytest.raises(ValueError, match="expected an nnx.Module.*got int"):
    from_nnx(lambda rngs: 3)


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
  with pytest.raises(ValueError, match="no entry 'shfit'; did you mean 'shift'"):
    make(["image", "shfit"]).apply(*variables, batch, train=False, key=None)


# Plain functions


def test_a_plain_function_with_params_alone(rng):
  w = rng.normal(size=(4, 2)).astype(np.float32)
  model = from_apply(lambda key, x: jax.random.normal(key, (x.shape[-1], 2)), lambda w, x: x @ w)
  assert_same(model.init(KEY, ones(3, 4)).params, jax.random.normal(KEY, (4, 2)), 0)
  outputs, state = model.apply(w, {}, ones(3, 4), train=True, key=None)
  assert_same(outputs["logits"], np.ones((3, 4)) @ w)
  assert state == {}
  given = from_apply(None, lambda w, x: x @ w, variables=w)
  assert_same((given.variables.params, given.init(KEY, ones(3, 4)).params), (w, w), 0)


def test_a_plain_function_gets_state_train_and_key_by_name():
  def apply(params, x, *, key, train, state):
    noise = jax.random.normal(key, x.shape) if train else 0
    return params * x + noise, {"calls": state["calls"] + train}

  variables = (jnp.float32(2), {"calls": jnp.int32(0)})
  for model in (
    from_apply(lambda key, x: variables, apply),
    from_apply(None, apply, variables=variables),
  ):
    made = model.init(KEY, ones(2, 3))
    assert made == variables
    outputs, state = model.apply(*made, ones(2, 3), train=True, key=KEY)
    assert_same(outputs["logits"], 2 + jax.random.normal(KEY, (2, 3)))
    assert state == {"calls": 1}
    outputs, state = model.apply(*made, ones(2, 3), train=False, key=None)
    assert (outputs["logits"] == 2).all() and state == {"calls": 0}


def test_pairs_are_pairs():
  def apply(params, x, state):
    return x

  # Two rows would unpack into 'outputs' and 'state', and two keys into 'params' and 'state'.
  with pytest.raises(ValueError, match=r"\(outputs, new state\), got"):
    from_apply(None, apply, variables=({}, {})).apply(
      {}, {}, {"image": jnp.ones((2, 3))}, train=False, key=None
    )
  with pytest.raises(ValueError, match=r"\(params, state\), got dict"):
    from_apply(None, apply, variables={"w": jnp.ones(2), "b": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"\(params, state\), got dict"):
    from_apply(lambda key, x: {"w": 1, "b": 2}, apply).init(KEY, ones(2, 3))


def test_neither_init_nor_variables():
  with pytest.raises(ValueError, match="neither init nor variables"):
    from_apply(None, lambda w, x: x).init(KEY, ones(2, 3))
