"""Tests BiT: the released networks' sizes and names, and outputs against float64 NumPy."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models import from_nnx, load_weights, pretrained
from distill_jax.models.zoo.bit import BiT, released_name
from distill_jax.trees import named_leaves

SMALL = dict(depth=(1, 2, 1, 1), classes=3, width=0.5)
EXAMPLE = {"image": jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)}


def small(dtype=None):
  return from_nnx(lambda rngs: BiT(2, **SMALL, dtype=dtype, rngs=rngs))


def shapes(*args, **kwargs):
  model = from_nnx(lambda rngs: BiT(*args, **kwargs, rngs=rngs))
  return jax.eval_shape(model.init, jax.random.key(0), {}).params


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_number_of_parameters_is_the_published_one():
  assert count(shapes(3, 50, 1000)) == 25_549_352  # timm's resnetv2_50x1_bit


@pytest.mark.slow
def test_released_teacher_has_its_sizes_and_names():
  params = shapes(3, 152, 1000, width=2)
  # Keras' summary of bit_tf2.models.ResnetV2: root, blocks 1 to 4, last group norm, head.
  parts = [params["stem"], *params["stages"].values(), params["norm"], params["head"]]
  blocks = [855_808, 9_329_664, 162_224_128, 59_801_600]
  assert [count(p) for p in parts] == [18_816, *blocks, 8_192, 4_097_000]
  # R152x2_T_384.npz, a teacher of Beyer et al. 2022, has 945,485,848 bytes. Its zip directory has
  # every name twice, so that a missing name, or one with another length, changes the sum.
  empty = {}
  for name, leaf in named_leaves({"params": params}):
    origin = released_name(name)
    name, axes = (origin, leaf.ndim) if isinstance(origin, str) else (origin[0], 4)
    empty[name] = np.zeros((0,) * axes, np.float32)
  file = io.BytesIO()
  np.savez(file, **empty)
  assert len(file.getvalue()) + 4 * count(params) == 945_485_848


def test_outputs_have_their_documented_names_and_shapes():
  x = jax.ShapeDtypeStruct((2, 224, 200, 3), jnp.float32)
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    outputs = jax.eval_shape(lambda x: BiT(3, (1, 1, 1, 1), 9, rngs=nnx.Rngs(0))(x), x)
  sides = [(56, 50), (28, 25), (14, 13), (7, 7)]
  maps = {k: (2, *side, 2 ** (7 + k)) for k, side in enumerate(sides, 1)}
  stages = {f"stage{k}{end}": shape for k, shape in maps.items() for end in ("", "_sum", "_preact")}
  ends = {"stem": (2, 56, 50, 64), "embedding": (2, 2048), "logits": (2, 9)}
  assert {name: value.shape for name, value in outputs.items()} == {**stages, **ends}


def released(rng):
  """Returns random weights of SMALL with the names and shapes of the released files."""
  arrays = {}

  def conv(name, *shape):
    arrays[f"resnet/{name}/standardized_conv2d/kernel"] = rng.normal(2, 3, shape)

  def norm(name, channels):
    arrays[f"resnet/{name}group_norm/gamma"] = rng.normal(1, 1, channels)
    arrays[f"resnet/{name}group_norm/beta"] = rng.normal(0, 1, channels)

  conv("root_block", 7, 7, 2, 32)
  inputs = 32
  for block, units in enumerate(SMALL["depth"], 1):
    middle = 16 * 2**block
    for unit in (f"block{block}/unit{i:02d}" for i in range(1, units + 1)):
      norm(f"{unit}/a/", inputs)
      conv(f"{unit}/a", 1, 1, inputs, middle)
      norm(f"{unit}/b/", middle)
      conv(f"{unit}/b", 3, 3, middle, middle)
      norm(f"{unit}/c/", middle)
      conv(f"{unit}/c", 1, 1, middle, 4 * middle)
      if unit.endswith("01"):
        conv(f"{unit}/a/proj", 1, 1, inputs, 4 * middle)
      inputs = 4 * middle
  norm("", inputs)
  arrays["resnet/head/conv2d/kernel"] = rng.normal(size=(1, 1, inputs, 3))
  arrays["resnet/head/conv2d/bias"] = rng.normal(size=3)
  return {name: value.astype(np.float32) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("bit") / "BiT.npz"
  np.savez(path, **released(np.random.default_rng(0)))
  return path


@pytest.fixture(scope="module")
def expected(path):
  """Images, and the outputs of the released file for them."""
  x = np.random.default_rng(1).normal(size=(2, 21, 12, 2)).astype(np.float32)
  return x, reference(np.load(path), x.astype(np.float64))


def windows(x, size, stride):
  """Returns windows [B, H', W', size, size, C] of [B, H, W, C], padded with zeros by size // 2."""
  side = size // 2
  x = np.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
  views = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
  return views.transpose(0, 1, 2, 4, 5, 3)


def conv(weights, name, x, stride=1):
  kernel = weights[f"resnet/{name}/standardized_conv2d/kernel"].astype(np.float64)
  kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
  return np.tensordot(windows(x, kernel.shape[0], stride), kernel, 3)


def norm(weights, name, x):
  rows = x.reshape(len(x), -1, 32, x.shape[-1] // 32)
  centered = rows - rows.mean((1, 3), keepdims=True)
  normal = (centered / np.sqrt(rows.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
  return (
    normal * weights[f"resnet/{name}group_norm/gamma"] + weights[f"resnet/{name}group_norm/beta"]
  )


def relu(x):
  return np.maximum(x, 0)


def reference(weights, x):
  x = windows(conv(weights, "root_block", x, 2), 3, 2).max((3, 4))
  found = {"stem": x}
  for block, units in enumerate(SMALL["depth"], 1):
    for number in range(1, units + 1):
      unit = f"block{block}/unit{number:02d}"
      stride = 2 if number == 1 and block > 1 else 1
      preact = norm(weights, f"{unit}/a/", x)
      if number == 1 and block > 1:
        found |= {
          f"stage{block - 1}_sum": x,
          f"stage{block - 1}_preact": preact,
          f"stage{block - 1}": relu(preact),
        }
      out = relu(norm(weights, f"{unit}/b/", conv(weights, f"{unit}/a", relu(preact))))
      out = conv(
        weights,
        f"{unit}/c",
        relu(norm(weights, f"{unit}/c/", conv(weights, f"{unit}/b", out, stride))),
      )
      x = out + (conv(weights, f"{unit}/a/proj", relu(preact), stride) if number == 1 else x)
  preact = norm(weights, "", x)
  embedding = relu(preact).mean((1, 2))
  logits = (
    embedding @ weights["resnet/head/conv2d/kernel"][0, 0] + weights["resnet/head/conv2d/bias"]
  )
  return found | {
    "stage4_sum": x,
    "stage4_preact": preact,
    "stage4": relu(preact),
    "embedding": embedding,
    "logits": logits,
  }


def test_released_file_gives_the_outputs_of_numpy(path, expected):
  x, arrays = expected
  model = pretrained(small(), path, EXAMPLE, names=released_name)
  run = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=True, key=None))
  outputs, state = run(model.variables, x)
  assert set(outputs) == set(arrays) and not jax.tree.leaves(state)
  for name, value in arrays.items():
    np.testing.assert_allclose(outputs[name], value, atol=2e-4 * np.abs(value).max(), err_msg=name)


def test_file_of_another_network_raises_leaf_by_leaf(path):
  deeper = from_nnx(lambda rngs: BiT(2, (1, 2, 2, 1), 4, width=0.5, rngs=rngs))
  with pytest.raises(ValueError, match="path: ") as error:
    pretrained(deeper, path, EXAMPLE, names=released_name)
  lines = str(error.value).splitlines()
  scale = "resnet/block3/unit02/b/group_norm/gamma, for params/stages/2/1/norm2/scale float32[128]"
  assert any(scale in line for line in lines)
  assert any("head/conv2d/kernel" in line and "float32[1024,4]" in line for line in lines)
  shallower = {"params": shapes(2, (1, 1, 1, 1), 3, width=0.5)}
  entry = "resnet/block2/unit02/c/standardized_conv2d/kernel"
  with pytest.raises(ValueError, match=f"unexpected: {entry}"):
    load_weights(path, shallower, names=released_name)


def test_low_precision_computes_low_and_stores_float32(path, expected):
  x, arrays = expected
  model = pretrained(small(jnp.bfloat16), path, EXAMPLE, names=released_name)
  assert {leaf.dtype for leaf in jax.tree.leaves(model.variables)} == {jnp.dtype("float32")}
  run = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=False, key=None)[0])
  outputs = run(model.variables, x)
  assert {value.dtype for value in outputs.values()} == {jnp.dtype("bfloat16")}
  logits = outputs["logits"].astype(np.float32)
  tolerance = 0.06 * np.abs(arrays["logits"]).max()
  np.testing.assert_allclose(logits, arrays["logits"], atol=tolerance)


def test_new_network_prefers_no_class():
  # Of the compiled function only the head remains.
  head = jax.jit(lambda: BiT(2, **SMALL, rngs=nnx.Rngs(0)).head.kernel[...])()
  assert head.shape == (1024, 3) and not head.any()


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda r: BiT(3, 51, 10, rngs=r), "depth"),
    (lambda r: BiT(3, (1, 1, 1), 10, rngs=r), "depth"),
    (lambda r: BiT(3, (1, 0, 1, 1), 10, rngs=r), "depth"),
    (lambda r: BiT(3, 50, 10, width=0.75, rngs=r), "width"),
    (lambda r: BiT(3, 50, 10, width=0, rngs=r), "width"),
    (lambda r: BiT(3, (1, 1, 1, 1), 10, rngs=r)(jnp.zeros((2, 8, 8, 1))), "images"),
  ],
)
def test_invalid_arguments_raise(call, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))
