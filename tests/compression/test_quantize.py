import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compression_networks import output_fn, random_variables
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses, objectives
from distill_jax.compression.quantize import fake_quantize, quantize
from distill_jax.compression.sizes import disk_bytes
from distill_jax.models import from_nnx
from distill_jax.models.zoo import cnn
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.storage.stablehlo import export_stablehlo, load_stablehlo
from distill_jax.storage.student import export_student, load_student
from distill_jax.train import make_init, make_train_step
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

pytest.importorskip("qwix")
# qwix 0.1.8 calls deprecated functions of NNX.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")


class Net(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 64, (3, 3), 2, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(64, rngs=rngs)
    self.head = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def net(rngs):
  return Net(rngs)


def mlp(rngs):
  return MLP(64, (16,), 10, rngs=rngs)


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.query, self.key = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

  def __call__(self, x):
    weights = nnx.softmax(jnp.einsum("bld,bsd->bls", self.query(x), self.key(x)))
    return jnp.einsum("bls,bsd->bld", weights, x)


def attention(rngs):
  return Attention(rngs)


def images(rng, rows=8):
  return {"image": rng.normal(size=(rows, 8, 8, 1)).astype(np.float32)}


def logits(model, variables, batch):
  return np.asarray(output_fn(model, "logits", batch)(variables))


def train(student, batches):
  """Distills for a step per batch; returns the first variables and the trained ones."""
  teacher = from_nnx(mlp)
  teacher_variables = random_variables(teacher, np.random.default_rng(1))
  objective = objectives.weighted(
    hard=(0.1, objectives.labels()),
    soft=(0.9, objectives.logits(losses.kl_divergence, temperature=2.0)),
  )
  optimizer = optax.adam(1e-2)
  init = jax.jit(make_init(student, teacher, objective, optimizer))
  first = state = init(jax.random.key(0), batches[0])
  step = jax.jit(make_train_step(student, teacher, objective, optimizer))
  for batch in batches:
    state, _ = step(state, teacher_variables, batch)
  variables = [Variables(s.params["student"], s.model_state["student"]) for s in (first, state)]
  return jax.device_get(variables)


def test_student_trained_with_rounding_is_served_in_int8(rng, tmp_path):
  labels = {"label": rng.integers(0, 10, 8).astype(np.int32), "where": np.ones(8, bool)}
  student, batch = from_nnx(fake_quantize(net)), images(rng)
  first, variables = train(student, [images(rng) | labels for _ in range(4)])
  trained = dict(named_leaves(variables.params))
  assert all(leaf.dtype == np.float32 for leaf in trained.values())
  assert all((trained[name] != leaf).any() for name, leaf in named_leaves(first.params))

  served = from_nnx(quantize(net, variables, batch["image"]))
  dtypes = {name: str(leaf.dtype) for name, leaf in named_leaves(served.variables.params)}
  assert {name: dtype for name, dtype in dtypes.items() if "kernel" in name} == {
    f"{layer}/kernel/array/{part}": dtype
    for layer in ("conv", "head")
    for part, dtype in (("qvalue", "int8"), ("scale", "float32"))
  }
  fake = logits(student, variables, batch)
  served_logits = output_fn(served, "logits", batch)
  real = np.asarray(served_logits(served.variables))
  np.testing.assert_allclose(real, fake, atol=1e-5)
  assert 1e-4 < np.abs(fake - logits(from_nnx(net), variables, batch)).max() < 0.5
  assert disk_bytes(served.variables).dense < 0.6 * disk_bytes(variables).dense

  folder = export_student(served.variables, tmp_path, description={})
  other = from_nnx(quantize(net, first, batch["image"]))
  loaded = load_student(folder, other)
  np.testing.assert_array_equal(served_logits(loaded), real)
  export_stablehlo(other, loaded, batch, folder, platforms=["cpu"])
  np.testing.assert_array_equal(load_stablehlo(folder)(batch)["logits"], real)


def test_kernels_are_rounded_by_output_channel(rng):
  variables = random_variables(from_nnx(mlp), rng)
  module = quantize(mlp, variables, images(rng)["image"])
  served = dict(named_leaves(from_nnx(module).variables.params))
  kernel = np.asarray(variables.params["hidden"][0]["kernel"], np.float64)
  scale = np.abs(kernel).max(0, keepdims=True) / 127.5
  np.testing.assert_allclose(served["hidden/0/kernel/array/scale"], scale, rtol=1e-6)
  value = np.asarray(served["hidden/0/kernel/array/qvalue"])
  assert set(np.abs(value.astype(int)).max(0)) <= {127, 128}
  np.testing.assert_allclose(value, np.clip(kernel / scale, -128, 127), atol=0.501)


@pytest.mark.parametrize("activations", [True, False])
def test_served_attention_matches_the_trained_one(rng, activations):
  batch = {"image": rng.normal(size=(2, 5, 16)).astype(np.float32)}
  fake = from_nnx(fake_quantize(attention, activations=activations))
  variables = random_variables(fake, rng)
  served = from_nnx(quantize(attention, variables, batch["image"], activations=activations))
  expected = logits(fake, variables, batch)
  np.testing.assert_allclose(logits(served, served.variables, batch), expected, atol=1e-5)
  assert np.abs(expected - logits(from_nnx(attention), variables, batch)).max() > 1e-4


def test_pattern_selects_layers(rng):
  variables = random_variables(from_nnx(net), rng)
  module = quantize(net, variables, images(rng)["image"], pattern="^head$", activations=False)
  int8 = [
    n for n, leaf in named_leaves(from_nnx(module).variables.params) if leaf.dtype == jnp.int8
  ]
  assert int8 == ["head/kernel/array/qvalue"]


def test_gradients_pass_the_rounding_on_eight_devices(rng, mesh):
  model, batch = from_nnx(fake_quantize(net)), images(rng, 16)
  variables = random_variables(model, rng)

  @jax.jit
  def gradient(params, batch):
    def loss(p):
      outputs, _ = model.apply(p, variables.state, batch, train=True, key=None)
      return (outputs["logits"] ** 2).mean()

    return jax.grad(loss)(params)

  one = gradient(variables.params, batch)
  sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  many = gradient(variables.params, sharded)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    assert np.abs(a).max() > 0
    # A value between two int8 values may be rounded either way.
    np.testing.assert_allclose(b, a, atol=0.02 * np.abs(a).max())


def test_gradients_of_max_pooling_match_select_and_scatter(rng, monkeypatch):
  model = from_nnx(fake_quantize(lambda rngs: CNN(1, (8, 16), 10, rngs=rngs)))
  batch = images(rng)
  variables = random_variables(model, rng)
  target = jnp.asarray(rng.normal(size=(8, 10)), jnp.float32)

  def gradient():
    def loss(params):
      logits = model.apply(params, variables.state, batch, train=True, key=None)[0]["logits"]
      return losses.kl_divergence(logits, target).mean()

    return jax.jit(jax.grad(loss))(variables.params)

  got = gradient()
  monkeypatch.setattr(cnn, "max_pool", lambda x: nnx.max_pool(x, (2, 2), (2, 2)))
  for (name, a), (_, b) in zip(named_leaves(got), named_leaves(gradient()), strict=True):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=name)


def test_invalid_arguments_raise(rng, monkeypatch):
  variables, x = random_variables(from_nnx(net), rng), images(rng)["image"]
  with pytest.raises(ValueError, match="^pattern: .*conv, head.*'block/'"):
    from_nnx(fake_quantize(net, pattern="block/"))
  # "^$" fits only the path of the full module.
  for pattern in ("block/", "^norm$", "^$"):
    with pytest.raises(ValueError, match="^pattern: .*conv, head"):
      quantize(net, variables, x, pattern=pattern)
  with pytest.raises(ValueError, match="^activations: .* conv:"):
    quantize(net, variables, x, activations=False)
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ImportError, match="'quantize'"):
    fake_quantize(net)
