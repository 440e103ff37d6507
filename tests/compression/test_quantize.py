import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import data, losses, objectives
from distill_jax.compression.quantize import fake_quantized, quantized
from distill_jax.compression.sizes import disk_bytes
from distill_jax.models import from_nnx
from distill_jax.models.zoo import cnn
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.storage.stablehlo import export_stablehlo, load_stablehlo
from distill_jax.storage.student import export_student, load_student
from distill_jax.train import fit
from distill_jax.trees import named_leaves

pytest.importorskip("qwix")
# qwix 0.1.8 asks NNX in old ways.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")


class Net(nnx.Module):
  def __init__(self, rngs):
    self.conv, self.norm = (
      nnx.Conv(1, 64, (3, 3), 2, use_bias=False, rngs=rngs),
      nnx.BatchNorm(64, rngs=rngs),
    )
    self.head = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def net(rngs):
  return Net(rngs)


def mlp(rngs):
  return MLP(64, (16,), 10, rngs=rngs)


def images(rng, rows=8):
  return {"image": jnp.asarray(rng.normal(size=(rows, 8, 8, 1)), jnp.float32)}


def said(model, variables, batch, output="logits"):
  return jax.jit(lambda v, b: model.apply(*v, b, train=False, key=None)[0][output])(
    variables, batch
  )


def test_a_student_distilled_with_rounding_is_served_in_int8(rng, tmp_path):
  arrays = {
    "image": rng.normal(size=(64, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(0, 10, 64),
  }
  source, teacher = data.Source(arrays, 10, name="random"), from_nnx(mlp)
  student = from_nnx(fake_quantized(net))
  objective = objectives.weighted(
    hard=(0.1, objectives.labels()),
    soft=(0.9, objectives.logits(losses.kl_divergence, temperature=2.0)),
  )
  weights = jax.jit(teacher.init)(jax.random.key(1), {})
  fitted = fit(
    student, teacher, objective, optax.adam(1e-2), source,
    steps=4, batch_size=16, teacher_variables=weights, validation=source, progress=False,
  )  # fmt: skip
  start = student.init(jax.random.fold_in(jax.random.key(0), 0), {})
  trained = dict(named_leaves(fitted.variables.params))
  assert all(leaf.dtype == jnp.float32 for leaf in trained.values())
  assert all(
    (leaf != own).any() for leaf, (_, own) in zip(trained.values(), named_leaves(start.params))
  )

  batch, variables = images(rng), jax.device_get(fitted.variables)
  served = from_nnx(quantized(net, variables, batch["image"]))
  assert {
    name: str(leaf.dtype)
    for name, leaf in named_leaves(served.variables.params)
    if "kernel" in name
  } == {
    f"{layer}/kernel/array/{part}": dtype
    for layer in ("conv", "head")
    for part, dtype in (("qvalue", "int8"), ("scale", "float32"))
  }
  fake, real = said(student, variables, batch), said(served, served.variables, batch)
  np.testing.assert_allclose(real, fake, atol=1e-5)
  assert 1e-4 < np.abs(fake - said(from_nnx(net), variables, batch)).max() < 0.5
  assert disk_bytes(served.variables).dense < 0.6 * disk_bytes(variables).dense

  folder = export_student(served.variables, tmp_path, description={})
  other = from_nnx(quantized(net, start, batch["image"]))
  loaded = load_student(folder, other)
  np.testing.assert_array_equal(said(other, loaded, batch), real)
  export_stablehlo(other, loaded, batch, folder, platforms=["cpu"])
  np.testing.assert_array_equal(load_stablehlo(folder)(batch)["logits"], real)


def test_kernels_are_rounded_for_each_output_channel(rng):
  plain = from_nnx(mlp)
  variables = plain.init(jax.random.key(0), {})
  served = dict(
    named_leaves(from_nnx(quantized(mlp, variables, images(rng)["image"])).variables.params)
  )
  kernel = np.asarray(variables.params["hidden"][0]["kernel"], np.float64)
  scale = np.abs(kernel).max(0, keepdims=True) / 127.5
  np.testing.assert_allclose(served["hidden/0/kernel/array/scale"], scale, rtol=1e-6)
  value = np.asarray(served["hidden/0/kernel/array/qvalue"])
  assert set(np.abs(value.astype(int)).max(0)) <= {127, 128}
  np.testing.assert_allclose(value, np.clip(kernel / scale, -128, 127), atol=0.501)


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.query, self.key = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

  def __call__(self, x):
    shares = nnx.softmax(jnp.einsum("bld,bsd->bls", self.query(x), self.key(x)))
    return jnp.einsum("bls,bsd->bld", shares, x)


@pytest.mark.parametrize("activations", [True, False])
def test_attention_is_served_as_it_was_trained(rng, activations):
  def make(rngs):
    return Attention(rngs)

  batch = {"image": jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)}
  fake = from_nnx(fake_quantized(make, activations=activations))
  variables = fake.init(jax.random.key(0), {})
  served = from_nnx(quantized(make, variables, batch["image"], activations=activations))
  expected = said(fake, variables, batch)
  np.testing.assert_allclose(said(served, served.variables, batch), expected, atol=1e-5)
  assert np.abs(expected - said(from_nnx(make), variables, batch)).max() > 1e-4


def test_a_pattern_chooses_layers(rng):
  variables = from_nnx(net).init(jax.random.key(0), {})
  module = quantized(net, variables, images(rng)["image"], pattern="^head$", activations=False)
  int8 = [
    n for n, leaf in named_leaves(from_nnx(module).variables.params) if leaf.dtype == jnp.int8
  ]
  assert int8 == ["head/kernel/array/qvalue"]


def test_gradients_pass_the_rounding_and_eight_devices_equal_one(rng, mesh):
  model, batch = from_nnx(fake_quantized(net)), images(rng, 16)
  variables = model.init(jax.random.key(0), {})

  @jax.jit
  def gradient(params, batch):
    return jax.grad(
      lambda p: (
        model.apply(p, variables.state, batch, train=True, key=None)[0]["logits"] ** 2
      ).mean()
    )(params)

  one = gradient(variables.params, batch)
  many = gradient(
    variables.params, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    assert np.abs(a).max() > 0
    # A number that lies on the edge of two int8 values goes either way.
    np.testing.assert_allclose(b, a, atol=0.02 * np.abs(a).max())


def test_gradients_pass_max_pooling_as_they_do_select_and_scatter(rng, monkeypatch):
  def make(rngs):
    return CNN(1, (8, 16), 10, rngs=rngs)

  model, batch = from_nnx(fake_quantized(make)), images(rng)
  variables = model.init(jax.random.key(0), {})
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


def test_what_cannot_be_is_refused(rng, monkeypatch):
  variables, x = from_nnx(net).init(jax.random.key(0), {}), images(rng)["image"]
  with pytest.raises(ValueError, match="'block/' fits no layer .*; some are conv, head"):
    from_nnx(fake_quantized(net, pattern="block/"))
  for pattern in ("block/", "^norm$", "^$"):  # "^$" is found in the path of the whole module alone
    with pytest.raises(ValueError, match="fits no layer that can be int8, .*; some are conv, head"):
      quantized(net, variables, x, pattern=pattern)
  with pytest.raises(ValueError, match="conv is a convolution"):
    quantized(net, variables, x, activations=False)
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ImportError, match=r"pip install 'distill-jax\[quantize\]'"):
    fake_quantized(net)
