"""Tests the plain networks: shapes, published sizes, modes, initialization, and one block against
NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax import compat
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.models.zoo.vgg import VGG

SMALL = {
  "mlp": lambda **k: MLP(64, (4,), 3, **k),
  "cnn": lambda **k: CNN(1, (4, 4), 3, **k),
  "vgg": lambda **k: VGG(1, 11, 3, width=1 / 32, **k),
}


def shapes(build, *shape):
  """Returns output shapes without computing anything: the module is built and called abstractly."""
  out = jax.eval_shape(lambda x: build(nnx.Rngs(0))(x), jax.ShapeDtypeStruct(shape, jnp.float32))
  return {name: value.shape for name, value in out.items()}


def block_shapes(size, widths, *, batch=2, classes=10):
  expected, side = {}, size
  for number, width in enumerate(widths, 1):
    expected[f"block{number}"] = (batch, side, side, width)
    side = max(1, side // 2)
  return {**expected, "embedding": (batch, widths[-1]), "logits": (batch, classes)}


@pytest.mark.parametrize("size", [8, 28, 224])
def test_cnn_and_vgg_outputs_have_documented_shapes(size):
  vgg = shapes(lambda rngs: VGG(3, 11, 10, rngs=rngs), 2, size, size, 3)
  assert vgg == block_shapes(size, (64, 128, 256, 512, 512))
  cnn = shapes(lambda rngs: CNN(1, (4, 6, 8, 10), 10, rngs=rngs), 2, size, size, 1)
  assert cnn == block_shapes(size, (4, 6, 8, 10))


def test_mlp_outputs_have_documented_shapes():
  actual = shapes(lambda rngs: MLP(64, (32, 16), 10, rngs=rngs), 2, 8, 8, 1)
  assert actual == {"hidden1": (2, 32), "hidden2": (2, 16), "logits": (2, 10)}
  assert shapes(lambda rngs: MLP(64, (), 10, rngs=rngs), 2, 64) == {"logits": (2, 10)}


def test_vgg_takes_maps_that_are_not_square():
  actual = shapes(lambda rngs: VGG(3, 13, 7, width=0.125, rngs=rngs), 1, 5, 33, 3)
  assert actual["block3"] == (1, 1, 8, 32) and actual["block5"] == (1, 1, 2, 64)
  # The width multiplies every block.
  assert [actual[f"block{k}"][-1] for k in range(1, 6)] == [8, 16, 32, 64, 64]


# Convolution weights and biases of torchvision's and Keras' VGGs without their fully connected
# layers.
@pytest.mark.parametrize(
  "depth, published", [(11, 9_220_480), (13, 9_404_992), (16, 14_714_688), (19, 20_024_384)]
)
def test_vgg_has_the_published_number_of_parameters(depth, published):
  net = nnx.eval_shape(lambda: VGG(3, depth, 10, rngs=nnx.Rngs(0)))
  params = nnx.to_flat_state(nnx.state(net, nnx.Param))
  sizes = {"/".join(map(str, path)): int(np.prod(leaf.shape)) for path, leaf in params}
  scales = sum(size for name, size in sizes.items() if name.endswith("scale"))
  head = sum(size for name, size in sizes.items() if name.startswith("head"))
  # Batch norm's shifts replace the biases; its scales and our head are extra.
  assert sum(sizes.values()) - scales - head == published
  assert head == 512 * 10 + 10


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_dropout_acts_only_in_training(name):
  model = from_nnx(lambda rngs: SMALL[name](dropout=0.5, rngs=rngs))
  batch = {"image": jnp.zeros((3, 8, 8, 1))}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)

  def program(train):
    run = lambda v, key: model.apply(*v, batch, train=train, key=key)[0]  # noqa: E731
    return str(jax.make_jaxpr(run)(variables, jax.random.key(1)))

  assert "random_bits" in program(train=True) and "random_bits" not in program(train=False)


def test_statistics_and_dropout_depend_on_the_mode(rng):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.cnn = CNN(1, (4, 4), 8, rngs=rngs)
      self.mlp = MLP(8, (16,), 4, dropout=0.5, rngs=rngs)

    def __call__(self, x):
      return self.mlp(self.cnn(x)["logits"])

  model = from_nnx(Net)
  batch = {"image": jnp.asarray(rng.normal(size=(3, 8, 8, 1)) + 1, jnp.float32)}
  variables = jax.jit(model.init)(jax.random.key(0), batch)

  @jax.jit
  def run(key):
    return [model.apply(*variables, batch, train=train, key=key) for train in (True, False)]

  (first, new_state), (evaluated, same_state) = run(jax.random.key(1))
  (second, _), (again, _) = run(jax.random.key(2))
  assert (first["logits"] != second["logits"]).any()
  np.testing.assert_array_equal(evaluated["logits"], again["logits"])
  jax.tree.map(np.testing.assert_array_equal, same_state, variables.state)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), new_state, variables.state)
  assert all(jax.tree.leaves(moved)) and len(jax.tree.leaves(moved)) == 4


@pytest.mark.parametrize("name", SMALL)
def test_dtype_and_axis_name_reach_every_layer(name):
  options = {} if name == "mlp" else {"axis_name": "data"}
  build = lambda rngs: SMALL[name](dtype=jnp.bfloat16, rngs=rngs, **options)  # noqa: E731
  module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
  assert not jax.tree.leaves(nnx.state(module, nnx.RngState))  # None without dropout.
  norms = [m for _, m in compat.iter_modules(module) if isinstance(m, nnx.BatchNorm)]
  assert all(norm.axis_name == "data" for norm in norms)
  assert len(norms) == {"mlp": 0, "cnn": 2, "vgg": 8}[name]
  bare = lambda x: SMALL[name](dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)  # noqa: E731
  outputs = jax.eval_shape(bare, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
  assert {value.dtype for value in outputs.values()} == {jnp.dtype("bfloat16")}


def test_first_block_equals_numpy_also_when_mapped(rng):
  """The block is a convolution, the batch's norm and a ReLU, over all devices where they are
  mapped."""
  module = CNN(2, (3,), 4, rngs=nnx.Rngs(0))
  x = rng.normal(size=(8, 5, 6, 2))
  kernel = np.asarray(module.blocks[0].conv.kernel[...], np.float64)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  out = sum(padded[:, i : i + 5, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
  normed = (out - out.mean((0, 1, 2))) / np.sqrt(out.var((0, 1, 2)) + 1e-5)
  pooled = np.maximum(normed, 0)[:, :4].reshape(8, 2, 2, 3, 2, 3).max((2, 4)).mean((1, 2))
  expected = {
    "block1": np.maximum(normed, 0),
    "embedding": pooled,
    "logits": pooled @ module.head.kernel[...] + module.head.bias[...],
  }
  params = nnx.state(module, nnx.Param)

  def run(axis_name):
    build = lambda: CNN(2, (3,), 4, axis_name=axis_name, rngs=nnx.Rngs(0))  # noqa: E731
    template = nnx.eval_shape(build)
    graph, _, rest = nnx.split(template, nnx.Param, ...)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return lambda x: nnx.merge(graph, params, zeros, copy=True)(x)

  single = jax.jit(run(None))(jnp.asarray(x, jnp.float32))
  rows = jnp.asarray(x, jnp.float32).reshape(4, 2, 5, 6, 2)
  mapped = jax.pmap(run("data"), "data", devices=jax.devices()[:4])(rows)
  for name, value in expected.items():
    np.testing.assert_allclose(single[name], value, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(mapped[name].reshape(value.shape), value, atol=2e-5, err_msg=name)


def test_relu_networks_keep_the_scale_of_their_input(rng):
  model = from_nnx(lambda rngs: MLP(256, (256,) * 4, 4, rngs=rngs))
  image = jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)
  run = jax.jit(
    lambda key: model.apply(*model.init(key, {}), {"image": image}, train=True, key=None)[0]
  )
  outputs = run(jax.random.key(0))
  ratio = float((outputs["hidden4"] ** 2).mean()) / float((outputs["hidden1"] ** 2).mean())
  assert 0.6 < ratio < 1.6


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda r: VGG(3, 15, 10, rngs=r), "depth: .* 15; nearest is 16"),
    (lambda r: VGG(3, 16, 10, width=0, rngs=r), "width"),
    (lambda r: CNN(3, (), 10, rngs=r), "widths"),
    (lambda r: CNN(3, (4,), 10, rngs=r)(jnp.zeros((2, 8, 8, 1))), "images"),
    (lambda r: VGG(1, 11, 10, width=1 / 64, rngs=r)(jnp.zeros((8, 8, 1))), "images"),
    (lambda r: MLP(64, (4,), 10, rngs=r)(jnp.zeros((2, 28, 28, 1))), "inputs: expected 64 .* 784"),
  ],
)
def test_invalid_arguments_raise(call, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))
