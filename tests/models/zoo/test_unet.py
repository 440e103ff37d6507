"""Tests the U-Net: outputs against formulas in float64 NumPy, the 3-D convolution against XLA's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models import from_nnx
from distill_jax.models.zoo.unet import UNet, conv_3d


def network(*arguments, **options):
  return nnx.eval_shape(lambda: UNet(*arguments, **options, rngs=nnx.Rngs(0)))


def shapes(*shape, widths=(4, 6, 10), **options):
  def outputs(x):
    return UNet(2, widths, 5, **options, rngs=nnx.Rngs(0))(x)

  return jax.eval_shape(outputs, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_outputs_of_images_have_their_documented_names_and_shapes():
  assert {name: x.shape for name, x in shapes(2, 8, 12, 2).items()} == {
    "encoder_0": (2, 8, 12, 4),
    "encoder_1": (2, 4, 6, 6),
    "bottleneck": (2, 2, 3, 10),
    "decoder_1": (2, 4, 6, 6),
    "decoder_0": (2, 8, 12, 4),
    "logits": (2, 8, 12, 5),
  }


def test_outputs_of_volumes_have_their_documented_names_and_shapes():
  outputs = shapes(2, 4, 6, 2, 2, widths=(4, 6), spatial_dims=3)
  assert {name: x.shape for name, x in outputs.items()} == {
    "encoder_0": (2, 4, 6, 2, 4),
    "bottleneck": (2, 2, 3, 1, 6),
    "decoder_0": (2, 4, 6, 2, 4),
    "logits": (2, 4, 6, 2, 5),
  }


def convolve(x, kernel):
  """Returns the correlation with zero padding of 1 in each dimension."""
  sides = x.shape[1:-1]
  padded = np.pad(x, [(0, 0), *[(1, 1)] * len(sides), (0, 0)])
  total = 0
  for taps in itertools.product(range(3), repeat=len(sides)):
    window = tuple(slice(tap, tap + side) for tap, side in zip(taps, sides))
    total = total + padded[:, *window] @ kernel[taps]
  return total


def normalize(x, norm):
  """Returns the group norm with groups of 2 channels: over the map and the group."""
  groups = x.reshape(x.shape[0], -1, x.shape[-1] // 2, 2)
  mean = groups.mean((1, 3), keepdims=True)
  groups = (groups - mean) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
  return groups.reshape(x.shape) * norm["scale"] + norm["bias"]


def level(x, params):
  for k in (1, 2):
    x = normalize(convolve(x, params[f"conv{k}"]["kernel"]), params[f"norm{k}"])
    x = np.maximum(x, 0)
  return x


def pool(x):
  for axis in range(1, x.ndim - 1):
    x = np.maximum(*(x.take(range(k, x.shape[axis], 2), axis) for k in range(2)))
  return x


def upsample(x, params):
  """Returns the transposed convolution: each pixel becomes a patch of sides 2."""
  sides = x.shape[1:-1]
  patches = x @ params["kernel"] + params["bias"]
  patches = patches.reshape(*x.shape[:-1], 2 ** len(sides), -1)
  result = np.zeros((x.shape[0], *(2 * side for side in sides), patches.shape[-1]))
  for k, offset in enumerate(itertools.product(range(2), repeat=len(sides))):
    result[:, *(slice(start, None, 2) for start in offset)] = patches[..., k, :]
  return result


def reference(params, x):
  expected = {"encoder_0": level(x, params["encoder"][0])}
  x = expected["bottleneck"] = level(pool(expected["encoder_0"]), params["bottleneck"])
  x = upsample(x, params["upsamplings"][0]["linear"])
  x = level(np.concatenate([expected["encoder_0"], x], -1), params["decoder"][0])
  logits = x @ params["head"]["kernel"] + params["head"]["bias"]
  return {**expected, "decoder_0": x, "logits": logits}


@pytest.mark.parametrize("sides", [(4, 6), (2, 4, 6)], ids=["images", "volumes"])
def test_outputs_equal_numpy(sides, rng):
  model = from_nnx(lambda rngs: UNet(2, (2, 6), 3, spatial_dims=len(sides), rngs=rngs))
  shapes = jax.eval_shape(model.init, jax.random.key(0), {})
  assert not jax.tree.leaves(shapes.state)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes.params)
  x = rng.normal(size=(2, *sides, 2))
  run = jax.jit(lambda p, image: model.apply(p, {}, {"image": image}, train=True, key=None)[0])
  actual = run(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, x)))
  expected = reference(params, x)
  assert set(actual) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, atol=1e-3, rtol=1e-4, err_msg=name)


def test_conv_3d_equals_the_3_d_convolution_of_xla(rng):
  x = jnp.asarray(rng.normal(size=(2, 4, 3, 5, 2)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 2, 3)), jnp.float32)
  cotangent = jnp.asarray(rng.normal(size=(2, 4, 3, 5, 3)), jnp.float32)

  def xla(x, kernel):
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=layout)

  def value_and_gradients(conv):
    def run(x, kernel):
      value, pullback = jax.vjp(conv, x, kernel)
      return value, *pullback(cotangent)

    return jax.jit(run)(x, kernel)

  for actual, expected in zip(value_and_gradients(conv_3d), value_and_gradients(xla)):
    np.testing.assert_allclose(actual, expected, atol=5e-5)


def test_bfloat16_reaches_every_output():
  for output in shapes(1, 4, 4, 4, 2, spatial_dims=3, dtype=jnp.bfloat16).values():
    assert output.dtype == jnp.bfloat16
  params = nnx.state(network(1, (4, 8), 3, dtype=jnp.bfloat16))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_groups_have_eight_channels_where_the_width_allows_it():
  net = network(1, (12, 16, 7), 3)
  sizes = [level.norm1.group_size for level in (*net.encoder, net.bottleneck)]
  assert sizes == [4, 8, 1]


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: network(1, (8,), 3), r"widths: .*\(8,\)"),
    (lambda: network(1, (8, 0), 3), r"widths: .*\(8, 0\)"),
    (lambda: network(1, (8, 16), 3, spatial_dims=1), "spatial_dims: .* got 1"),
    (lambda: shapes(1, 8, 10, 2), "images: .*width.* 4 .* got 10: .* 8"),
    (lambda: shapes(1, 2, 4, 2), "images: .*height.* 4 .* got 2: .* 4"),
    (lambda: shapes(1, 3, 4, 4, 2, spatial_dims=3), "images: .*depth.* 4 .* got 3"),
    (lambda: shapes(1, 8, 8, 1), r"images: .*channels=2\], got \(1, 8, 8, 1\)"),
    (lambda: shapes(1, 8, 8, 8, 2), r"images: .*height, width"),
    (lambda: shapes(1, 8, 8, 2, spatial_dims=3), r"images: .*depth, height, width"),
  ],
)
def test_invalid_arguments_raise(call, words):
  with pytest.raises(ValueError, match=rf"^{words}"):
    call()
