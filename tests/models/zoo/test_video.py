"""Networks of clips and series: shapes, formulas, the order of frames, and masked frames."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models.zoo.sequence import SequenceCNN
from distill_jax.models.zoo.video import CNN2Plus1D, FrameCNN, shift_frames

NETWORKS = {
  "2+1": (lambda: CNN2Plus1D(2, (3, 4), 5, rngs=nnx.Rngs(0)), (4, 4, 2)),
  "frames": (lambda: FrameCNN(2, (4, 4), 5, shift=0.25, rngs=nnx.Rngs(0)), (4, 4, 2)),
  "blind": (lambda: FrameCNN(2, (4, 4), 5, shift=0, rngs=nnx.Rngs(0)), (4, 4, 2)),
  "series": (lambda: SequenceCNN(2, (3, 4), 5, rngs=nnx.Rngs(0)), (2,)),
}


@functools.cache
def built(name, train=True):
  """Returns a network's graph and a state of random kernels; its own init would be compiled."""
  build, _ = NETWORKS[name]

  def make():
    network = build()
    network.train() if train else network.eval()
    return network

  rng = np.random.default_rng(0)

  def value(path, leaf):
    name = jax.tree_util.keystr(path)
    if "kernel" in name:
      return jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[-2] ** 0.5, leaf.dtype)
    return (jnp.ones if "scale" in name or "var" in name else jnp.zeros)(leaf.shape, leaf.dtype)

  graph, shapes = nnx.split(nnx.eval_shape(make))
  return graph, jax.tree_util.tree_map_with_path(value, shapes)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, x, valid=None):
  """Returns the outputs and the batch statistics after them."""
  network = nnx.merge(graph, state)
  return network(x, valid), nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))


def clips(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(x, kernel, dilation=1):
  """Returns XLA's own convolution, [B, T, H, W, C] with a kernel [T, H, W, in, out]."""
  return jax.lax.conv_general_dilated(
    jnp.asarray(x, jnp.float32),
    kernel,
    (1, 1, 1),
    "SAME",
    rhs_dilation=(dilation, 1, 1),
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    precision="highest",
  )


def norm_relu(x):
  """Returns the batch norm of a new layer in training, and ReLU, in float64."""
  x = np.asarray(x, np.float64)
  axes = tuple(range(x.ndim - 1))
  return np.maximum((x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5), 0)


@pytest.mark.parametrize("name", ["2+1", "frames", "series"])
def test_outputs_have_their_documented_names_and_shapes(name):
  build, size = NETWORKS[name]
  x = jax.ShapeDtypeStruct((2, 7, *size), jnp.float32)
  shapes = {name: y.shape for name, y in jax.eval_shape(lambda x: build()(x), x).items()}
  second = (2, 2, 4) if len(size) == 3 else (4,)
  first = (*size[:-1], 4 if name == "frames" else 3)
  assert shapes == {
    "block1": (2, 7, *first),
    "block2": (2, 7, *second),
    "embedding": (2, 4),
    "logits": (2, 5),
  }


def test_factorized_blocks_are_two_convolutions():
  graph, state = built("2+1")
  params = nnx.to_pure_dict(nnx.filter_state(state, nnx.Param))
  x = clips(2, 6, 4, 4, 2)
  outputs, _ = run(graph, state, x)
  for i, (inputs, width) in enumerate([(2, 3), (3, 4)]):
    space = params["space"][i]["conv"]["kernel"]
    time = params["time"][i]["linear"]["kernel"]
    assert space.shape == (3, 3, inputs, width)
    x = norm_relu(conv(x, space[None]))
    x = norm_relu(conv(x, time.reshape(3, 1, 1, width, width)))
    np.testing.assert_allclose(outputs[f"block{i + 1}"], x, atol=1e-4)
    b, t, h, w, _ = x.shape
    x = x.reshape(b, t, h // 2, 2, w // 2, 2, width).max((3, 5))
  embedding = x.mean((1, 2, 3))
  np.testing.assert_allclose(outputs["embedding"], embedding, atol=1e-4)
  logits = embedding @ params["head"]["kernel"] + params["head"]["bias"]
  np.testing.assert_allclose(outputs["logits"], logits, atol=1e-4)


def test_blocks_of_series_are_dilated():
  graph, state = built("series")
  params = nnx.to_pure_dict(nnx.filter_state(state, nnx.Param))
  x = clips(2, 6, 2)
  outputs, _ = run(graph, state, x)
  for i, width in enumerate((3, 4)):
    kernel = params["blocks"][i]["linear"]["kernel"].reshape(3, 1, 1, -1, width)
    x = norm_relu(conv(x[:, :, None, None], kernel, dilation=2**i))[:, :, 0, 0]
    np.testing.assert_allclose(outputs[f"block{i + 1}"], x, atol=1e-4)
  np.testing.assert_allclose(outputs["embedding"], x.mean(1), atol=1e-4)


def test_shift_takes_channels_of_both_neighbors():
  x = np.arange(3 * 5, dtype=np.float32).reshape(1, 3, 5)
  expected = x.copy()
  expected[:, :, 0] = [[x[0, 1, 0], x[0, 2, 0], 0]]
  expected[:, :, 1] = [[0, x[0, 0, 1], x[0, 1, 1]]]
  np.testing.assert_array_equal(shift_frames(jnp.asarray(x), 0.2), expected)
  assert shift_frames(x, 0.0) is x
  half = shift_frames(jnp.ones((1, 2, 3)), 0.5)  # one channel of 3 from each side, not two
  np.testing.assert_array_equal(half, [[[1, 0, 1], [0, 1, 1]]])


@pytest.mark.parametrize("name, is_blind", [("blind", True), ("frames", False)])
def test_only_a_shift_sees_the_order_of_frames(name, is_blind):
  x = clips(2, 6, 4, 4, 2)
  forth, back = (run(*built(name), frames)[0]["logits"] for frames in (x, x[:, ::-1]))
  assert np.allclose(forth, back, atol=1e-5) == is_blind


@pytest.mark.parametrize(
  "name, train", [("2+1", True), ("series", False), ("frames", True), ("series", True)]
)
def test_masked_frames_count_nothing(name, train):
  """A padded clip equals the clip without its padding, batch statistics and NaN included."""
  x = clips(2, 6, *NETWORKS[name][1])
  exists = np.arange(6) < 4
  padded = np.where(exists.reshape(1, 6, *(1,) * (x.ndim - 2)), x, np.nan)
  masked, statistics = run(*built(name, train), padded, np.stack([exists, exists]))
  cut, expected_statistics = run(*built(name, train), x[:, :4])
  for output, expected in cut.items():
    value = masked[output][:, :4] if output.startswith("block") else masked[output]
    np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=output)
  assert not np.any(masked["block1"][:, 4:])
  for values in zip(*map(jax.tree.leaves, (statistics, expected_statistics))):
    np.testing.assert_allclose(*values, atol=1e-5)


def test_masked_nan_reaches_no_gradient():
  graph, state = built("2+1")
  x = clips(2, 6, 4, 4, 2).copy()
  x[1, 3:] = np.nan
  x[0] = np.nan  # A clip without a valid frame.
  valid = np.array([[False] * 6, [True] * 3 + [False] * 3])
  loss = jax.jit(jax.value_and_grad(lambda state: run(graph, state, x, valid)[0]["logits"].sum()))
  assert all(np.isfinite(value).all() for value in jax.tree.leaves(loss(state)))


def outputs_for(name, x, valid=None):
  build, _ = NETWORKS[name]
  spec = jax.ShapeDtypeStruct(x, jnp.float32)
  mask = None if valid is None else jax.ShapeDtypeStruct(valid, bool)
  return jax.eval_shape(lambda x, valid: build()(x, valid), spec, mask)


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda: CNN2Plus1D(1, (), 3, rngs=nnx.Rngs(0)), "widths"),
    (lambda: SequenceCNN(1, (0,), 3, rngs=nnx.Rngs(0)), "widths"),
    (lambda: FrameCNN(1, (4, 8), 3, shift=0.6, rngs=nnx.Rngs(0)), "shift"),
    (lambda: FrameCNN(1, (4, 8), 3, shift=0.1, rngs=nnx.Rngs(0)), "shift"),
    (lambda: outputs_for("2+1", (2, 4, 4, 2)), "clips"),
    (lambda: outputs_for("frames", (2, 3, 4, 4, 1)), "clips"),
    (lambda: outputs_for("series", (2, 3, 4, 4, 2)), "series"),
    (lambda: outputs_for("series", (2, 3, 2), (2, 4)), "valid"),
  ],
)
def test_bad_argument_is_named(call, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    call()
