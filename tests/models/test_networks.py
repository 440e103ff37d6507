import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.models.zoo.vgg import VGG

MODES = {
  "train": {"deterministic": False, "use_running_average": False, "raise_if_not_found": False},
  "eval": {"deterministic": True, "use_running_average": True, "raise_if_not_found": False},
}


def parameters(module):
  return {
    "/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
  }


def shapes(build, *shape):
  """Output shapes without computing anything: the module is made and called abstractly."""
  out = jax.eval_shape(lambda x: build(nnx.Rngs(0))(x), jax.ShapeDtypeStruct(shape, jnp.float32))
  return {name: value.shape for name, value in out.items()}


def vgg_shapes(size, widths, *, batch=2, classes=10):
  expected, side = {}, size
  for number, width in enumerate(widths, 1):
    expected[f"block{number}"] = (batch, side, side, width)
    side = max(1, side // 2)
  return {**expected, "embedding": (batch, widths[-1]), "logits": (batch, classes)}


@pytest.mark.parametrize("size", [8, 28, 32, 224])
@pytest.mark.parametrize("depth", [11, 19])
def test_vgg_gives_its_documented_outputs_at_every_size(size, depth):
  got = shapes(lambda rngs: VGG(3, depth, 10, rngs=rngs), 2, size, size, 3)
  assert got == vgg_shapes(size, (64, 128, 256, 512, 512))


@pytest.mark.parametrize("size", [8, 28, 32, 224])
def test_cnn_gives_its_documented_outputs_at_every_size(size):
  got = shapes(lambda rngs: CNN(1, (4, 6, 8, 10), 10, rngs=rngs), 2, size, size, 1)
  assert got == vgg_shapes(size, (4, 6, 8, 10))


def test_mlp_gives_its_documented_outputs():
  got = shapes(lambda rngs: MLP(64, (32, 16), 10, rngs=rngs), 2, 8, 8, 1)
  assert got == {"hidden1": (2, 32), "hidden2": (2, 16), "logits": (2, 10)}
  assert shapes(lambda rngs: MLP(64, (), 10, rngs=rngs), 2, 64) == {"logits": (2, 10)}


def test_maps_that_are_not_square_and_have_three_channels():
  got = shapes(lambda rngs: VGG(3, 11, 7, width=0.125, rngs=rngs), 1, 5, 33, 3)
  assert got["block3"] == (1, 1, 8, 32) and got["block5"] == (1, 1, 2, 64)


# Convolution weights and biases of torchvision's and Keras' VGGs without their fully connected layers.
@pytest.mark.parametrize(
  "depth, published", [(11, 9_220_480), (13, 9_404_992), (16, 14_714_688), (19, 20_024_384)]
)
def test_vgg_has_the_published_number_of_parameters(depth, published):
  params = parameters(nnx.eval_shape(lambda: VGG(3, depth, 10, rngs=nnx.Rngs(0))))
  sizes = {name: int(np.prod(leaf.shape)) for name, leaf in params.items()}
  scales = sum(size for name, size in sizes.items() if name.endswith("scale"))
  head = sum(size for name, size in sizes.items() if name.startswith("head"))
  # Batch norm's shifts stand for the biases; its scales and our head come on top.
  assert sum(sizes.values()) - scales - head == published
  assert head == 512 * 10 + 10


def test_width_multiplies_every_block():
  got = shapes(lambda rngs: VGG(1, 13, 3, width=0.25, rngs=rngs), 1, 8, 8, 1)
  assert [got[f"block{k}"][-1] for k in range(1, 6)] == [16, 32, 64, 128, 128]


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 9, 1), (1, 5, 4, 2), (3, 2, 2, 1)])
def test_pooling_equals_reduce_window(shape, rng):
  x = jnp.asarray(rng.permutation(int(np.prod(shape))).reshape(shape), jnp.float32)  # no ties

  def reference(x):
    return nnx.max_pool(x, (2, 2), (2, 2))

  np.testing.assert_array_equal(max_pool(x), reference(x))
  weights = jnp.asarray(rng.normal(size=reference(x).shape), jnp.float32)
  got, expected = (
    jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (lambda x: max_pool(x), reference)
  )
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_maxima_share_their_gradient(dtype):
  inf, nan = np.inf, np.nan
  patches = [
    [3, 3, 3, 3],
    [0, 5, 5, 5],
    [0, 7, 1, 7],
    [inf, inf, -inf, 0],
    [-inf, -inf, -inf, -inf],
    [nan, 1, 2, inf],
  ]
  shares = [
    [1 / 4] * 4,
    [0, 1 / 3, 1 / 3, 1 / 3],
    [0, 1 / 2, 0, 1 / 2],
    [1 / 2, 1 / 2, 0, 0],
    [1 / 4] * 4,
  ]
  shares.append([1 / 3, 1 / 3, 0, 1 / 3])
  x = jnp.asarray(patches, dtype).reshape(-1, 2, 2, 1)
  np.testing.assert_array_equal(max_pool(x).ravel().astype(float), np.max(patches, 1))
  got = jax.grad(lambda x: max_pool(x).sum())(x)
  assert got.dtype == dtype
  np.testing.assert_array_equal(got.reshape(-1, 4), jnp.asarray(shares, dtype))
  np.testing.assert_array_equal(jax.jvp(max_pool, (x[:1],), (x[:1],))[1], x[:1, :1, :1])


def test_pooling_leaves_axes_of_length_one():
  x = jnp.arange(5.0).reshape(1, 1, 5, 1)
  np.testing.assert_array_equal(max_pool(x).ravel(), [1, 3])
  np.testing.assert_array_equal(max_pool(x[:, :, :1]), x[:, :, :1])


@pytest.mark.parametrize(
  "build",
  [
    lambda rngs: MLP(64, (16,), 4, dropout=0.5, rngs=rngs),
    lambda rngs: VGG(1, 11, 4, width=1 / 32, dropout=0.5, rngs=rngs),
  ],
  ids=["mlp", "vgg"],
)
def test_dropout_acts_in_the_train_view_alone(build, rng):
  module, x = build(nnx.Rngs(0)), jnp.asarray(rng.normal(size=(3, 8, 8, 1)), jnp.float32)
  train, evaluate = (nnx.view(module, **MODES[mode]) for mode in ("train", "eval"))
  assert (train(x)["logits"] != train(x)["logits"]).any()
  np.testing.assert_array_equal(evaluate(x)["logits"], evaluate(x)["logits"])


def test_no_dropout_holds_no_random_state():
  for module in (MLP(4, (3,), 2, rngs=nnx.Rngs(0)), VGG(1, 11, 2, width=1 / 32, rngs=nnx.Rngs(0))):
    assert not jax.tree.leaves(nnx.state(module, nnx.RngState))


@pytest.mark.parametrize(
  "build",
  [lambda rngs: CNN(1, (4, 4), 3, rngs=rngs), lambda rngs: VGG(1, 11, 3, width=1 / 32, rngs=rngs)],
  ids=["cnn", "vgg"],
)
def test_batch_statistics_move_in_the_train_view_alone(build, rng):
  module, x = build(nnx.Rngs(0)), jnp.asarray(rng.normal(size=(5, 8, 8, 1)) + 1, jnp.float32)
  statistics = lambda: jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))  # noqa: E731
  before = statistics()
  nnx.view(module, **MODES["eval"])(x)
  jax.tree.map(np.testing.assert_array_equal, statistics(), before)
  nnx.view(module, **MODES["train"])(x)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), statistics(), before)
  assert all(jax.tree.leaves(changed))


def test_first_block_is_convolution_norm_relu(rng):
  """Against a convolution written out, with the batch's own mean and variance."""
  module, x = CNN(2, (3,), 4, rngs=nnx.Rngs(0)), rng.normal(size=(4, 5, 6, 2))
  kernel = np.asarray(module.blocks[0].conv.kernel[...], np.float64)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  out = sum(padded[:, i : i + 5, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
  normed = (out - out.mean((0, 1, 2))) / np.sqrt(out.var((0, 1, 2)) + 1e-5)
  got = module(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got["block1"], np.maximum(normed, 0), atol=1e-5)
  pooled = np.maximum(normed, 0)[:, :4].reshape(4, 2, 2, 3, 2, 3).max((2, 4)).mean((1, 2))
  np.testing.assert_allclose(got["embedding"], pooled, atol=1e-5)
  head = module.head
  np.testing.assert_allclose(got["logits"], pooled @ head.kernel[...] + head.bias[...], atol=1e-5)


def test_relu_networks_keep_the_scale_of_their_input(rng):
  module = MLP(256, (256,) * 6, 4, rngs=nnx.Rngs(0))
  out = module(jnp.asarray(rng.normal(size=(64, 256)), jnp.float32))
  assert 0.5 < float((out["hidden6"] ** 2).mean()) / float((out["hidden1"] ** 2).mean()) < 2


@pytest.mark.parametrize(
  "build",
  [
    lambda **k: MLP(64, (4,), 3, **k),
    lambda **k: CNN(1, (4,), 3, **k),
    lambda **k: VGG(1, 11, 3, width=1 / 32, **k),
  ],
  ids=["mlp", "cnn", "vgg"],
)
def test_low_precision_computes_low_and_stores_float32(build):
  module = build(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
  out = jax.eval_shape(
    nnx.view(module, **MODES["eval"]), jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
  )
  assert {value.dtype for value in out.values()} == {jnp.dtype("bfloat16")}


def test_mapped_batch_norm_sees_the_whole_batch(rng):
  x = jnp.asarray(rng.normal(size=(8, 2, 4, 4, 1)), jnp.float32)
  for build in (
    lambda **k: CNN(1, (3,), 2, rngs=nnx.Rngs(0), **k),
    lambda **k: VGG(1, 11, 2, width=1 / 32, rngs=nnx.Rngs(0), **k),
  ):
    mapped = jax.pmap(lambda x, b=build: b(axis_name="data")(x)["block1"], "data")(x)
    whole = build()(x.reshape(16, 4, 4, 1))["block1"]
    np.testing.assert_allclose(mapped.reshape(whole.shape), whole, atol=2e-5)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda r: VGG(3, 15, 10, rngs=r), r"depth=15: .*\(11, 13, 16, 19\); the nearest is 16"),
    (lambda r: VGG(3, 16, 10, width=0, rngs=r), "width=0"),
    (lambda r: CNN(3, (), 10, rngs=r), "widths"),
    (lambda r: CNN(3, (4,), 10, rngs=r)(jnp.zeros((2, 8, 8, 1))), r"channels=3.*\(2, 8, 8, 1\)"),
    (
      lambda r: VGG(1, 11, 10, width=1 / 64, rngs=r)(jnp.zeros((8, 8, 1))),
      r"channels=1.*\(8, 8, 1\)",
    ),
    (lambda r: MLP(64, (4,), 10, rngs=r)(jnp.zeros((2, 28, 28, 1))), "inputs=64 .* got 784"),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(nnx.Rngs(0))
