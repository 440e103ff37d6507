"""ResNet and Wide ResNet: RepDistiller's sizes, and outputs written out in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models.zoo.resnet import ResNet, WideResNet

X4 = (32, 64, 128, 256)
NETWORKS = {
  "resnet": lambda **k: ResNet(1, 8, 3, widths=(2, 2, 3, 4), **k),
  "wide": lambda **k: WideResNet(1, 10, 1, 3, **k),
}


def outputs(build, *shape):
  return jax.eval_shape(
    lambda x: build(rngs=nnx.Rngs(0))(x), jax.ShapeDtypeStruct(shape, jnp.float32)
  )


# The sizes of RepDistiller's networks with 100 classes; tables of papers that use them round these to 0.01 M.
@pytest.mark.parametrize(
  "build, published",
  [
    (lambda r: ResNet(3, 8, 100, rngs=r), 83_892),
    (lambda r: ResNet(3, 20, 100, rngs=r), 278_324),
    (lambda r: ResNet(3, 32, 100, rngs=r), 472_756),
    (lambda r: ResNet(3, 56, 100, rngs=r), 861_620),
    (lambda r: ResNet(3, 110, 100, rngs=r), 1_736_564),
    (lambda r: ResNet(3, 8, 100, widths=X4, rngs=r), 1_233_540),
    (lambda r: ResNet(3, 32, 100, widths=X4, rngs=r), 7_433_860),
    (lambda r: WideResNet(3, 40, 2, 100, rngs=r), 2_255_156),
    (lambda r: WideResNet(3, 16, 2, 100, rngs=r), 703_284),
    (lambda r: WideResNet(3, 40, 1, 100, rngs=r), 569_780),
  ],
)
def test_numbers_of_parameters_are_the_published_ones(build, published):
  params = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
  assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) == published


@pytest.mark.parametrize("size, sizes", [(32, (32, 16, 8)), (7, (7, 4, 2)), (1, (1, 1, 1))])
def test_outputs_have_their_documented_names_and_shapes(size, sizes):
  got = {
    n: o.shape
    for n, o in outputs(lambda **k: ResNet(3, 8, 9, widths=X4, **k), 2, size, size, 3).items()
  }
  maps = {k: (2, side, side, width) for k, (side, width) in enumerate(zip(sizes, X4[1:]), 1)}
  ends = {"embedding": (2, 256), "logits": (2, 9)}
  both = {f"stage{k}{end}": shape for k, shape in maps.items() for end in ("", "_preact")}
  assert got == {"stem": (2, size, size, 32), **both, **ends}
  got = {
    n: o.shape
    for n, o in outputs(lambda **k: WideResNet(3, 16, 4, 9, **k), 2, size, size, 3).items()
  }
  three = both | {f"stage{k}_sum": shape for k, shape in maps.items()}
  assert got == {"stem": (2, size, size, 16), **three, **ends}


def conv(layer, x, stride=1):
  """Correlation with zero padding of half the kernel on both sides, in float64."""
  kernel = np.asarray(layer.kernel[...], np.float64)
  size, (high, wide) = kernel.shape[0], x.shape[1:3]
  half = size // 2
  padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  whole = sum(
    padded[:, i : i + high, j : j + wide] @ kernel[i, j] for i in range(size) for j in range(size)
  )
  return whole[:, ::stride, ::stride]


def norm(x):
  """Batch norm of a new layer in training: unit scale, no shift."""
  return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def relu(x):
  return np.maximum(x, 0)


def resnet_reference(net, x):
  found = {"stem": relu(norm(conv(net.stem, x)))}
  x = found["stem"]
  for k, (stage, first_stride) in enumerate(zip(net.stages, (1, 2, 2)), 1):
    for i, block in enumerate(stage):
      stride = 1 if i else first_stride
      shortcut = norm(conv(block.shortcut.layers[0], x, stride)) if block.shortcut else x
      x = norm(conv(block.conv2, relu(norm(conv(block.conv1, x, stride))))) + shortcut
      found[f"stage{k}_preact"], x = x, relu(x)
    found[f"stage{k}"] = x
  return found


def wide_reference(net, x):
  x = conv(net.stem, x)
  found = {"stem": x}
  for k, (stage, first_stride) in enumerate(zip(net.stages, (1, 2, 2)), 1):
    for i, block in enumerate(stage):
      stride, active = 1 if i else first_stride, relu(norm(x))
      shortcut = conv(block.shortcut, active, stride) if block.shortcut else x
      x = conv(block.conv2, relu(norm(conv(block.conv1, active, stride)))) + shortcut
    found |= {f"stage{k}_sum": x, f"stage{k}_preact": norm(x), f"stage{k}": relu(norm(x))}
  return found


@pytest.mark.parametrize(
  "net, reference",
  [
    (lambda: ResNet(2, 14, 4, widths=(3, 5, 4, 5), rngs=nnx.Rngs(0)), resnet_reference),
    (lambda: WideResNet(2, 16, 2, 4, rngs=nnx.Rngs(0)), wide_reference),
  ],
  ids=["resnet14", "wrn_16_2"],
)
def test_outputs_equal_the_formulas(net, reference, rng):
  net, x = net(), rng.normal(size=(4, 6, 5, 2))
  expected = reference(net, x)
  expected["embedding"] = expected["stage3"].mean((1, 2))
  expected["logits"] = expected["embedding"] @ np.asarray(net.head.kernel[...]) + np.asarray(
    net.head.bias[...]
  )
  got = net(jnp.asarray(x, jnp.float32))
  assert set(got) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, atol=1e-4, err_msg=name)


def test_running_statistics_keep_nine_tenths(rng):
  net, x = NETWORKS["resnet"](rngs=nnx.Rngs(0)), rng.normal(size=(4, 3, 3, 1))
  net(jnp.asarray(x, jnp.float32))
  mean, variance = (getattr(conv(net.stem, x), what)((0, 1, 2)) for what in ("mean", "var"))
  np.testing.assert_allclose(net.norm.mean[...], 0.1 * mean, atol=1e-5)
  np.testing.assert_allclose(net.norm.var[...], 0.9 + 0.1 * variance, atol=1e-5)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_low_precision_computes_low_and_stores_float32(build):
  module = nnx.eval_shape(lambda: build(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
  found = outputs(lambda **k: build(dtype=jnp.bfloat16, **k), 2, 8, 8, 1)
  assert {value.dtype for value in found.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_mapped_batch_norm_sees_the_whole_batch(build, rng):
  x = jnp.asarray(rng.normal(size=(4, 2, 4, 4, 1)), jnp.float32)
  mapped = jax.pmap(lambda x: build(axis_name="data", rngs=nnx.Rngs(0))(x)["logits"], "data")(x)
  whole = jax.jit(lambda x: build(rngs=nnx.Rngs(0))(x)["logits"])(x.reshape(8, 4, 4, 1))
  np.testing.assert_allclose(mapped.reshape(whole.shape), whole, atol=1e-4)


def test_weights_start_with_the_variance_of_their_fan_out():
  kernel = ResNet(3, 8, 10, widths=X4, rngs=nnx.Rngs(0)).stages[2][0].conv1.kernel[...]
  assert kernel.shape == (3, 3, 128, 256)
  assert float(kernel.var()) == pytest.approx(2 / (9 * 256), rel=0.02)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda r: ResNet(3, 18, 10, rngs=r), r"depth=18: expected 6 n \+ 2 .* nearest is 20"),
    (lambda r: ResNet(3, 2, 10, rngs=r), "the nearest is 8"),
    (
      lambda r: ResNet(3, 8, 10, widths=(16, 32, 64), rngs=r),
      r"widths: expected four .*\(16, 32, 64\)",
    ),
    (lambda r: WideResNet(3, 41, 2, 10, rngs=r), r"depth=41: expected 6 n \+ 4 .* nearest is 40"),
    (lambda r: WideResNet(3, 10, 0, 10, rngs=r), "width=0"),
    (lambda r: ResNet(3, 8, 10, rngs=r)(jnp.zeros((2, 8, 8, 1))), r"channels=3.*\(2, 8, 8, 1\)"),
    (lambda r: WideResNet(3, 10, 1, 10, rngs=r)(jnp.zeros((8, 8, 3))), r"channels=3.*\(8, 8, 3\)"),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(nnx.Rngs(0))
