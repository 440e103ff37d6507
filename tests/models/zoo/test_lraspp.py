"""Tests the light segmentation network: outputs against formulas in float64 NumPy, the depthwise
convolution against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interpolation import interpolate

from distill_jax import compat
from distill_jax.models import from_nnx
from distill_jax.models.zoo.lraspp import LRASPP, depthwise_conv


def network(widths=(4, 6, 8), **options):
  return nnx.eval_shape(lambda: LRASPP(2, widths, 5, **options, rngs=nnx.Rngs(0)))


def shapes(*shape, **options):
  def outputs(x):
    return LRASPP(2, (4, 6, 8), 5, head_width=7, blocks=1, **options, rngs=nnx.Rngs(0))(x)

  return jax.eval_shape(outputs, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("stride, grid", [(1, (17, 8)), (4, (5, 2))])
def test_outputs_have_their_documented_names_and_shapes(stride, grid):
  outputs = shapes(2, 17, 8, 2, stride=stride, dtype=jnp.bfloat16)
  assert {x.dtype for x in outputs.values()} == {jnp.dtype("bfloat16")}
  assert {name: x.shape for name, x in outputs.items()} == {
    "encoder_0": (2, 9, 4, 4),
    "encoder_1": (2, 5, 2, 6),
    "encoder_2": (2, 3, 1, 8),
    "head": (2, 3, 1, 7),
    "logits": (2, *grid, 5),
  }


def normalize(x, params):
  """Returns the batch norm in training."""
  normal = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
  return normal * params["norm"]["scale"] + params["norm"]["bias"]


def relu6(x):
  return np.clip(x, 0, 6)


def convolve(x, kernel, stride):
  """Returns the correlation with zero padding; of each channel by itself for a kernel [3, 3, C]."""
  rows, columns = x.shape[1:3]
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  product = np.matmul if kernel.ndim == 4 else np.multiply
  total = sum(
    product(padded[:, i : i + rows, j : j + columns], kernel[i, j])
    for i in range(3)
    for j in range(3)
  )
  return total[:, ::stride, ::stride]


def pointwise(x, params):
  return normalize(x @ params["conv"]["kernel"][0, 0], params)


def inverted_residual(x, params, stride):
  out = relu6(pointwise(x, params["expand"]))
  depthwise = params["depthwise"]
  out = relu6(normalize(convolve(out, depthwise["kernel"], stride), depthwise))
  out = pointwise(out, params["project"])
  return x + out if stride == 1 else out


def affine(x, params):
  return x @ params["kernel"] + params["bias"]


def reference(params, x):
  sides = x.shape[1:3]
  stem = params["stem"]
  x = relu6(normalize(convolve(x, stem["conv"]["kernel"], 2), stem))
  expected = {"encoder_0": x}
  for k, blocks in params["levels"].items():
    x = inverted_residual(inverted_residual(x, blocks[0], 2), blocks[1], 1)
    expected[f"encoder_{k + 1}"] = x
  gate = 1 / (1 + np.exp(-(x.mean((1, 2), keepdims=True) @ params["gate"]["kernel"])))
  expected["head"] = np.maximum(pointwise(x, params["project"]), 0) * gate
  low = affine(expected["encoder_1"], params["low_logits"])
  high = affine(expected["head"], params["high_logits"])
  logits = low + interpolate(high, low.shape[1:3])
  return {**expected, "logits": interpolate(logits, sides)}


def test_outputs_equal_numpy(rng):
  options = {"expansion": 1, "blocks": 2, "head_width": 5}
  model = from_nnx(lambda rngs: LRASPP(2, (2, 3, 4), 3, **options, rngs=rngs))
  shapes = jax.eval_shape(model.init, jax.random.key(0), {})
  params, state = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  x = rng.normal(size=(3, 13, 10, 2))
  run = jax.jit(lambda p, s, image: model.apply(p, s, {"image": image}, train=True, key=None)[0])
  actual = run(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, state, x)))
  expected = reference(params, x)
  assert set(actual) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("stride, sides", [(1, (4, 5)), (2, (1, 2))])
def test_depthwise_conv_equals_the_grouped_convolution_of_xla(stride, sides, rng):
  x = jnp.asarray(rng.normal(size=(2, *sides, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3)), jnp.float32)
  expected = jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=3,
  )
  actual = depthwise_conv(x, kernel, stride)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_dtype_and_axis_name_reach_every_layer():
  module = network(dtype=jnp.bfloat16, axis_name="data")
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
  norms = [m for _, m in compat.iter_modules(module) if isinstance(m, nnx.BatchNorm)]
  assert {norm.axis_name for norm in norms} == {"data"} and len(norms) == 14


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: network((4, 6)), r"widths: .*\(4, 6\)"),
    (lambda: network(expansion=0), "expansion: .* 0"),
    (lambda: network(blocks=0), "blocks: .* 0"),
    (lambda: network(head_width=0), "head_width: .* 0"),
    (lambda: network(stride=2), "stride: .* got 2"),
    (lambda: shapes(2, 8, 8, 1), r"images: .*\(2, 8, 8, 1\)"),
  ],
)
def test_invalid_arguments_raise(call, words):
  with pytest.raises(ValueError, match=rf"^{words}"):
    call()
