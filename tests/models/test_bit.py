"""BiT: the released networks' sizes and names, and outputs written out in float64 NumPy from the names alone."""

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
  made = jax.eval_shape(
    from_nnx(lambda rngs: BiT(*args, **kwargs, rngs=rngs)).init, jax.random.key(0), {}
  )
  return made.params


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def teacher():
  """The parameters of R152x2 with 1,000 classes."""
  return shapes(3, 152, 1000, width=2)


def test_numbers_of_parameters_are_the_published_ones(teacher):
  # Keras' summary of bit_tf2.models.ResnetV2: root, blocks 1 to 4, last group norm, head.
  parts = [teacher["stem"], *teacher["stages"].values(), teacher["norm"], teacher["head"]]
  assert [count(p) for p in parts] == [
    18_816,
    855_808,
    9_329_664,
    162_224_128,
    59_801_600,
    8_192,
    4_097_000,
  ]
  assert count(shapes(3, 50, 1000)) == 25_549_352  # timm's resnetv2_50x1_bit


def test_a_file_of_these_names_is_as_long_as_the_released_one(teacher):
  # R152x2_T_384.npz, a teacher of Beyer et al. 2022, has 945,485,848 bytes. Its zip directory holds every name twice,
  # so a name that is missing, or one letter longer, changes the sum.
  empty = {}
  for name, leaf in named_leaves({"params": teacher}):
    origin = released_name(name)
    name, axes = (origin, leaf.ndim) if isinstance(origin, str) else (origin[0], 4)
    empty[name] = np.zeros((0,) * axes, np.float32)
  file = io.BytesIO()
  np.savez(file, **empty)
  assert len(file.getvalue()) + 4 * count(teacher) == 945_485_848


def test_outputs_have_their_documented_names_and_shapes():
  x = jax.ShapeDtypeStruct((2, 224, 200, 3), jnp.float32)
  got = jax.eval_shape(lambda x: BiT(3, (1, 1, 1, 1), 9, rngs=nnx.Rngs(0))(x), x)
  maps = {
    k: (2, *sides, 2 ** (7 + k))
    for k, sides in enumerate([(56, 50), (28, 25), (14, 13), (7, 7)], 1)
  }
  both = {f"stage{k}{end}": shape for k, shape in maps.items() for end in ("", "_sum", "_preact")}
  ends = {"stem": (2, 56, 50, 64), "embedding": (2, 2048), "logits": (2, 9)}
  assert {name: value.shape for name, value in got.items()} == {**both, **ends}


def released(rng):
  """Random weights of SMALL under the names, and in the shapes, of the released files."""
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


@pytest.fixture
def path(rng, tmp_path):
  np.savez(tmp_path / "BiT.npz", **released(rng))
  return tmp_path / "BiT.npz"


def windows(x, size, stride):
  """[B, H, W, C] padded with zeros by size // 2 -> [B, H', W', size, size, C]."""
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


def test_a_released_file_gives_the_formulas_outputs(rng, path):
  x = rng.normal(size=(2, 37, 20, 2)).astype(np.float32)
  model = pretrained(small(), path, EXAMPLE, names=released_name)
  got, state = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=True, key=None))(
    model.variables, x
  )
  expected = reference(np.load(path), x.astype(np.float64))
  assert set(got) == set(expected) and not jax.tree.leaves(state)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, atol=2e-4 * np.abs(value).max(), err_msg=name)


def test_a_file_of_another_network_is_refused_leaf_by_leaf(path):
  deeper = from_nnx(lambda rngs: BiT(2, (1, 2, 2, 1), 4, width=0.5, rngs=rngs))
  with pytest.raises(ValueError) as refused:
    pretrained(deeper, path, EXAMPLE, names=released_name)
  message = str(refused.value)
  assert (
    "missing: resnet/block3/unit02/b/group_norm/gamma, for params/stages/2/1/norm2/scale float32[128]"
    in message
  )
  assert "resnet/head/conv2d/kernel is float32[1024,3], expected float32[1024,4]" in message
  shallower = jax.eval_shape(
    from_nnx(lambda rngs: BiT(2, (1, 1, 1, 1), 3, width=0.5, rngs=rngs)).init, jax.random.key(0), {}
  )
  with pytest.raises(
    ValueError, match="unexpected: resnet/block2/unit02/c/standardized_conv2d/kernel"
  ):
    load_weights(path, shallower, names=released_name)


def test_low_precision_computes_low_and_stores_float32(rng, path):
  model = pretrained(small(jnp.bfloat16), path, EXAMPLE, names=released_name)
  assert {leaf.dtype for leaf in jax.tree.leaves(model.variables)} == {jnp.dtype("float32")}
  x = rng.normal(size=(2, 16, 16, 2)).astype(np.float32)
  got = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=False, key=None)[0])(
    model.variables, x
  )
  assert {value.dtype for value in got.values()} == {jnp.dtype("bfloat16")}
  expected = reference(np.load(path), x.astype(np.float64))["logits"]
  np.testing.assert_allclose(
    got["logits"].astype(np.float32), expected, atol=0.06 * np.abs(expected).max()
  )


def test_a_new_network_prefers_no_class():
  x = np.random.default_rng(1).normal(size=(2, 8, 8, 2))
  new = jax.jit(lambda x: BiT(2, **SMALL, rngs=nnx.Rngs(0))(x))(x)
  assert not new["logits"].any() and new["embedding"].any()


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda r: BiT(3, 51, 10, rngs=r), r"depth=51: expected one of \[26, 50, 101, 152\]"),
    (lambda r: BiT(3, (1, 1, 1), 10, rngs=r), r"depth=\(1, 1, 1\).*four numbers"),
    (lambda r: BiT(3, (1, 0, 1, 1), 10, rngs=r), "units >= 1"),
    (lambda r: BiT(3, 50, 10, width=0.75, rngs=r), "width=0.75: expected a multiple of 0.5"),
    (lambda r: BiT(3, 50, 10, width=0, rngs=r), "width=0"),
    (
      lambda r: BiT(3, (1, 1, 1, 1), 10, rngs=r)(jnp.zeros((2, 8, 8, 1))),
      r"channels=3.*\(2, 8, 8, 1\)",
    ),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))
