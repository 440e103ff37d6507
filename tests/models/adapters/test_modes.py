"""Tests what stays fixed in training, auxiliary losses, and modules that an adapter rejects."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_networks import KEY, assert_same

from distill_jax.models import cohort, from_apply, from_linen, from_nnx
from distill_jax.train import make_loss_fn
from distill_jax.types import Objective, Variables

BATCH = {"image": np.random.default_rng(0).normal(3, 2, size=(8, 4)).astype(np.float32)}


class Frozen(nnx.Module):
  """One batch norm and one dropout as given, and a batch norm in its default mode."""

  def __init__(self, rngs, frozen=True):
    self.norm = nnx.BatchNorm(4, use_running_average=frozen, rngs=rngs)
    self.drop = nnx.Dropout(0.5, deterministic=frozen, rngs=rngs)
    self.free = nnx.BatchNorm(4, rngs=rngs)
    self.lora = nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=rngs), rngs=rngs)

  def __call__(self, x):
    return {"fixed": self.drop(self.norm(x)), "free": self.free(x), "logits": self.lora(x)}


def train_once(model):
  variables = model.init(KEY, BATCH)
  outputs, state = model.apply(*variables, BATCH, train=True, key=KEY)
  return variables, outputs, state


@pytest.mark.parametrize("built", [True, False])
def test_layers_that_their_owner_froze_stay_frozen(built):
  model = from_nnx(Frozen(nnx.Rngs(0)) if built else Frozen)
  variables, outputs, state = train_once(model)
  assert_same(outputs["fixed"], BATCH["image"] / np.sqrt(1 + 1e-5), 1e-5)
  assert_same(state["norm"], variables.state["norm"], 0)
  assert (state["free"]["mean"] != 0).all()
  assert_same(outputs["free"].mean(0), np.zeros(4), 1e-5)


def test_module_in_evaluation_mode_stays_in_it_until_train():
  module = Frozen(nnx.Rngs(0), frozen=False)
  module.eval()
  variables, _, state = train_once(from_nnx(module))
  assert_same(state, variables.state, 0)
  module.train()
  assert (train_once(from_nnx(module))[2]["norm"]["mean"] != 0).all()


def test_filter_of_trainable_variables_keeps_statistics_fixed():
  model = from_nnx(lambda rngs: Frozen(rngs, frozen=False), trainable=nnx.LoRAParam)
  variables, outputs, state = train_once(model)
  assert jax.tree.map(jnp.shape, variables.params) == {"lora": {"lora_a": (4, 2), "lora_b": (2, 3)}}
  assert_same(state, variables.state, 0)
  assert (outputs["fixed"] == 0).any()  # Dropout has no statistics.
  assert_same(outputs["free"], BATCH["image"] / np.sqrt(1 + 1e-5), 1e-5)


class Sowing(linen.Module):
  @linen.compact
  def __call__(self, x):
    self.sow("losses", "a", x.sum())
    self.sow("losses", "b", jnp.ones(2))
    return linen.Dense(2)(x)


def test_sown_losses_are_an_output_in_training():
  model = from_linen(Sowing())
  variables, outputs, state = train_once(model)
  np.testing.assert_allclose(outputs["auxiliary_loss"], BATCH["image"].sum() + 2, rtol=1e-6)
  assert state == variables.state == {}
  evaluated, _ = model.apply(*variables, BATCH, train=False, key=None)
  assert "auxiliary_loss" not in evaluated


class Loss(nnx.Variable):
  pass


class Growing(nnx.Module):
  def __call__(self, x):
    self.seen = Loss(x.sum())
    return x


def test_call_that_adds_variables_raises():
  with pytest.raises(ValueError, match="^module: .*seen"):
    train_once(from_nnx(Growing()))


class Recurrent(nnx.Module):
  def __init__(self, rngs):
    self.rnn = nnx.RNN(nnx.SimpleCell(4, 5, rngs=rngs))

  def __call__(self, x):
    return self.rnn(x[None])[0]


def test_features_inside_a_scan_raise():
  train_once(from_nnx(Recurrent))
  with pytest.raises(ValueError, match="^features: .*nnx.RNN"):
    train_once(from_nnx(Recurrent, features=["rnn/cell"]))


class Partitioned(nnx.Module):
  def __init__(self, rngs):
    kernel_init = nnx.with_partitioning(nnx.initializers.ones_init(), (None, "model"))
    self.layer = nnx.Linear(4, 4, kernel_init=kernel_init, rngs=rngs)

  def __call__(self, x):
    return self.layer(x)


@pytest.mark.skipif(not hasattr(nnx, "use_eager_sharding"), reason="flax 0.12 shards eagerly")
def test_partitioned_parameters_need_a_mesh():
  with pytest.raises(ValueError, match=r"^module: .*set_mesh.*use_eager_sharding"):
    from_nnx(Partitioned)
  with nnx.use_eager_sharding(False):
    module = Partitioned(nnx.Rngs(0))
  assert train_once(from_nnx(module))[1]["logits"].shape == (8, 4)


class Arguments(nnx.Module):
  def __init__(self, width, *, rngs):
    self.layer = nnx.Linear(4, width, rngs=rngs)


@pytest.mark.parametrize(
  ("adapter", "network", "hint"),
  [
    (from_nnx, Sowing(), "from_linen"),
    (from_nnx, Arguments, "class Arguments.*instance"),
    (from_nnx, 3, "int 3"),
    (from_nnx, None, "NoneType"),
    (from_linen, Growing(), "from_nnx"),
    (from_linen, Sowing, "class Sowing.*instance"),
    (from_linen, lambda x: x, "from_apply"),
  ],
)
def test_networks_of_another_library_name_their_adapter(adapter, network, hint):
  with pytest.raises(ValueError, match=rf"^module: .*{hint}"):
    adapter(network)


def test_arguments_of_from_apply_that_are_no_functions_raise():
  with pytest.raises(ValueError, match="^apply: "):
    from_apply(lambda key, x: {}, None)
  with pytest.raises(ValueError, match="^init: "):
    from_apply({"w": 1.0}, lambda w, x: x)


@pytest.mark.parametrize(
  ("result", "field"),
  [
    (lambda x: "text", "str"),
    (lambda x: x.sum(), "outputs"),
    (lambda x: (x, x), "a tuple of 2"),
    (lambda x: {"logits": x, "name": "text"}, "str as 'name': leave"),
    (lambda x: {"logits": [x, x]}, "a list of 2"),
    (lambda x: {"logits": x.sum()}, "rows first"),
    (lambda x: {0: x}, "as 0"),
  ],
)
def test_outputs_of_other_kinds_are_named(result, field):
  model = from_apply(None, lambda params, x: result(x), variables={})
  with pytest.raises(ValueError, match=rf"^outputs: .*{field}"):
    model.apply({}, {}, BATCH, train=False, key=None)


class Normed(linen.Module):
  @linen.compact
  def __call__(self, image):
    return linen.BatchNorm(use_running_average=True)(linen.Dense(4)(image))


def test_missing_linen_collections_and_layers_are_named():
  variables = Normed().init(jax.random.key(0), BATCH["image"])
  for values, missing in (
    ({"params": variables["params"]}, "batch_stats"),
    ({**variables, "params": {"Dense_0": variables["params"]["Dense_0"]}}, "scale"),
  ):
    model = from_linen(Normed(), values)
    with pytest.raises(ValueError, match=f"^variables: .*Normed.*{missing}"):
      model.apply(*model.variables, BATCH, train=False, key=None)


def test_bound_linen_module_names_unbind():
  bound = Normed().bind(Normed().init(jax.random.key(0), BATCH["image"]))
  with pytest.raises(ValueError, match=r"^module: .*Normed.*unbind\(\)"):
    from_linen(bound)
  model = from_linen(*bound.unbind())
  model.apply(*model.variables, BATCH, train=False, key=None)


def test_outputs_that_are_none_are_left_out():
  model = from_apply(None, lambda params, x: {"logits": x, "extra": None}, variables={})
  assert model.apply({}, {}, BATCH, train=False, key=None)[0].keys() == {"logits"}


def test_auxiliary_losses_join_the_loss_of_training():
  student = cohort([from_linen(Sowing()), from_linen(Sowing())])

  def apply(params, state, student, teacher, batch, **context):
    return {"square": (1.0, ((student["logits"] ** 2).sum(-1), None))}, state

  objective = Objective(lambda *_: Variables({}, {}), apply)
  variables = student.init(KEY, BATCH)
  params = {"student": variables.params, "objective": {}}
  state = {"student": variables.state, "objective": {}}
  loss_fn = make_loss_fn(student, None, objective)
  loss, aux = loss_fn(params, state, (), BATCH, step=jnp.int32(0), key=KEY)
  auxiliary_loss = 2 * (BATCH["image"].sum() + 2)
  np.testing.assert_allclose(aux.terms["auxiliary_loss"][0], auxiliary_loss, rtol=1e-6)
  square, count = aux.terms["square"]
  np.testing.assert_allclose(loss, square / count + auxiliary_loss, rtol=1e-5)
  assert "auxiliary_loss" not in aux.outputs
