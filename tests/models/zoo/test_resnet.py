"""Tests ResNet and Wide ResNet: RepDistiller's sizes, and outputs against formulas in float64
NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax import compat
from distill_jax.models import from_nnx
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


def published(*arguments, slow=False):
  """A case; sizes of deeper networks are linear in the depth and run with the slow tests."""
  return pytest.param(*arguments, marks=pytest.mark.slow if slow else ())


# The sizes of RepDistiller's networks with 100 classes; tables of papers round them to 0.01 M.
@pytest.mark.parametrize(
  "build, number",
  [
    published(lambda r: ResNet(3, 8, 100, rngs=r), 83_892),
    published(lambda r: ResNet(3, 20, 100, rngs=r), 278_324),
    published(lambda r: ResNet(3, 32, 100, rngs=r), 472_756, slow=True),
    published(lambda r: ResNet(3, 56, 100, rngs=r), 861_620, slow=True),
    published(lambda r: ResNet(3, 110, 100, rngs=r), 1_736_564, slow=True),
    published(lambda r: ResNet(3, 8, 100, widths=X4, rngs=r), 1_233_540),
    published(lambda r: ResNet(3, 32, 100, widths=X4, rngs=r), 7_433_860, slow=True),
    published(lambda r: WideResNet(3, 16, 2, 100, rngs=r), 703_284),
    published(lambda r: WideResNet(3, 40, 1, 100, rngs=r), 569_780, slow=True),
    published(lambda r: WideResNet(3, 40, 2, 100, rngs=r), 2_255_156, slow=True),
  ],
)
def test_number_of_parameters_is_the_published_one(build, number):
  params = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
  assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) == number


@pytest.mark.parametrize("size, sizes", [(32, (32, 16, 8)), (7, (7, 4, 2)), (1, (1, 1, 1))])
def test_outputs_have_their_documented_names_and_shapes(size, sizes):
  widths = (3, 16, 32, 64)
  resnet = outputs(lambda **k: ResNet(3, 8, 9, widths=widths, **k), 2, size, size, 3)
  maps = {k: (2, side, side, width) for k, (side, width) in enumerate(zip(sizes, widths[1:]), 1)}
  ends = {"embedding": (2, 64), "logits": (2, 9)}
  both = {f"stage{k}{end}": shape for k, shape in maps.items() for end in ("", "_preact")}
  expected = {"stem": (2, size, size, 3), **both, **ends}
  assert {name: value.shape for name, value in resnet.items()} == expected
  wide = outputs(lambda **k: WideResNet(3, 10, 1, 9, **k), 2, size, size, 3)
  three = both | {f"stage{k}_sum": shape for k, shape in maps.items()}
  expected = {"stem": (2, size, size, 16), **three, **ends}
  assert {name: value.shape for name, value in wide.items()} == expected


def conv(layer, x, stride=1):
  """Returns the correlation with zero padding of half the kernel on both sides, in float64."""
  kernel = np.asarray(layer["kernel"], np.float64)
  size, (high, wide) = kernel.shape[0], x.shape[1:3]
  half = size // 2
  padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  full = sum(
    padded[:, i : i + high, j : j + wide] @ kernel[i, j] for i in range(size) for j in range(size)
  )
  return full[:, ::stride, ::stride]


def norm(x):
  """Returns the batch norm of a new layer in training: unit scale, no shift."""
  return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def relu(x):
  return np.maximum(x, 0)


def stages(params):
  """Returns each stage's blocks with their strides."""
  for number, stage in params["stages"].items():
    blocks = [stage[i] for i in sorted(stage)]
    yield int(number) + 1, [(block, 2 if number and not i else 1) for i, block in enumerate(blocks)]


def resnet_reference(params, x):
  x = relu(norm(conv(params["stem"], x)))
  expected = {"stem": x}
  for k, blocks in stages(params):
    for block, stride in blocks:
      shortcut = norm(conv(block["shortcut"]["layers"][0], x, stride)) if "shortcut" in block else x
      x = norm(conv(block["conv2"], relu(norm(conv(block["conv1"], x, stride))))) + shortcut
      expected[f"stage{k}_preact"] = x
      x = relu(x)
    expected[f"stage{k}"] = x
  return expected


def wide_reference(params, x):
  x = conv(params["stem"], x)
  expected = {"stem": x}
  for k, blocks in stages(params):
    for block, stride in blocks:
      active = relu(norm(x))
      shortcut = conv(block["shortcut"], active, stride) if "shortcut" in block else x
      x = conv(block["conv2"], relu(norm(conv(block["conv1"], active, stride)))) + shortcut
    expected |= {f"stage{k}_sum": x, f"stage{k}_preact": norm(x), f"stage{k}": relu(norm(x))}
  return expected


@pytest.mark.parametrize(
  "build, reference",
  [
    (lambda rngs: ResNet(2, 14, 4, widths=(3, 5, 4, 5), rngs=rngs), resnet_reference),
    (lambda rngs: WideResNet(2, 16, 1, 4, rngs=rngs), wide_reference),
  ],
  ids=["resnet14", "wrn_16_1"],
)
def test_outputs_and_statistics_equal_numpy(build, reference, rng):
  model = from_nnx(build)
  x = rng.normal(size=(4, 6, 5, 2))
  variables = jax.jit(model.init)(jax.random.key(0), {})
  run = jax.jit(lambda v, image: model.apply(*v, {"image": image}, train=True, key=None))
  actual, state = run(variables, jnp.asarray(x, jnp.float32))
  params = jax.tree.map(np.asarray, variables.params)
  expected = reference(params, x)
  expected["embedding"] = expected["stage3"].mean((1, 2))
  expected["logits"] = expected["embedding"] @ params["head"]["kernel"] + params["head"]["bias"]
  assert set(actual) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, atol=1e-4, err_msg=name)
  # Running statistics keep nine tenths. A ResNet's first norm sees the stem, a Wide ResNet's block
  # does.
  first = state["norm"] if reference is resnet_reference else state["stages"][0][0]["norm1"]
  stem = conv(params["stem"], x)
  np.testing.assert_allclose(first["mean"], 0.1 * stem.mean((0, 1, 2)), atol=1e-5)
  np.testing.assert_allclose(first["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_dtype_and_axis_name_reach_every_layer(build):
  module = nnx.eval_shape(lambda: build(dtype=jnp.bfloat16, axis_name="data", rngs=nnx.Rngs(0)))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
  norms = [m for _, m in compat.iter_modules(module) if isinstance(m, nnx.BatchNorm)]
  assert {norm.axis_name for norm in norms} == {"data"} and len(norms) >= 7
  values = outputs(lambda **k: build(dtype=jnp.bfloat16, **k), 2, 8, 8, 1).values()
  assert {value.dtype for value in values} == {jnp.dtype("bfloat16")}


def test_weights_start_with_the_variance_of_their_fan_out():
  def kernel():
    return (
      ResNet(3, 8, 10, widths=(1, 1, 128, 256), rngs=nnx.Rngs(0)).stages[2][0].conv1.kernel[...]
    )

  values = jax.jit(kernel)()
  assert values.shape == (3, 3, 128, 256)
  assert float(values.var()) == pytest.approx(2 / (9 * 256), rel=0.02)


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda r: ResNet(3, 18, 10, rngs=r), "depth: .* 18; nearest is 20"),
    (lambda r: ResNet(3, 2, 10, rngs=r), "depth: .* 2; nearest is 8"),
    (lambda r: ResNet(3, 8, 10, widths=(16, 32, 64), rngs=r), "widths"),
    (lambda r: WideResNet(3, 41, 2, 10, rngs=r), "depth: .* 41; nearest is 40"),
    (lambda r: WideResNet(3, 10, 0, 10, rngs=r), "width"),
    (lambda r: ResNet(3, 8, 10, rngs=r)(jnp.zeros((2, 8, 8, 1))), "images"),
    (lambda r: WideResNet(3, 10, 1, 10, rngs=r)(jnp.zeros((8, 8, 3))), "images"),
  ],
)
def test_invalid_arguments_raise(call, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))
