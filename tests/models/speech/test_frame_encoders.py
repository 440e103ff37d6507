"""Recognizers of speech and of text lines: padding, shapes, the depthwise convolution, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models import from_nnx
from distill_jax.models.speech.depthwise import depthwise_conv
from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.speech.speech_encoder import SpeechEncoder
from distill_jax.models.speech.text_line import TextLineEncoder

CONFIG = FrameEncoderConfig(7, 8, 1, num_heads=2, kernel_size=5)
RECURRENT = FrameEncoderConfig(7, 8, 1, layer="gru")
SPEECH = {
  "conformer": functools.partial(SpeechEncoder, CONFIG, num_features=6),
  "gru": functools.partial(SpeechEncoder, RECURRENT, num_features=6, subsampling=2),
}
LINE = functools.partial(TextLineEncoder, RECURRENT, widths=(4, 8, 8), height=16)


@functools.cache
def model_of(make, inputs):
  """Returns a Model, and weights far from the small or equal ones of its beginning."""
  model = from_nnx(lambda rngs: make(rngs=rngs), inputs=inputs)
  variables = jax.jit(model.init)(jax.random.key(0), {})
  rng = np.random.default_rng(0)
  move = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), variables.params)
  return model, variables._replace(params=jax.tree.map(jnp.add, variables.params, move))


@functools.cache
def apply_of(make, inputs, train=False):
  """Returns a compiled function `(variables, batch) -> (outputs, gradient, state)`."""
  model, _ = model_of(make, inputs)

  def loss(params, state, batch):
    outputs, state = model.apply(params, state, batch, train=train, key=None)
    valid = jnp.arange(outputs["logits"].shape[1]) < outputs["lengths"][:, None]
    return jnp.where(valid[..., None], jnp.sin(outputs["logits"]), 0).sum(), (outputs, state)

  def run(variables, batch):
    (_, (outputs, state)), gradient = jax.value_and_grad(loss, has_aux=True)(*variables, batch)
    return outputs, gradient, state

  return jax.jit(run)


def speech_batch(steps=21):
  rng = np.random.default_rng(1)
  return {
    "features": rng.normal(size=(4, steps, 6)).astype(np.float32),
    "frames": np.array([21, 14, 1, 7], np.int32),
  }


def line_batch(width=24):
  rng = np.random.default_rng(2)
  return {
    "image": rng.normal(size=(3, 16, width, 1)).astype(np.float32),
    "widths": np.array([24, 13, 4], np.int32),
  }


def longer(batch, name, extra, value):
  """Returns a batch whose rows are longer and whose padding is `value`."""
  axis = 1 if name == "features" else 2
  size = batch["frames" if axis == 1 else "widths"]
  pad = [(0, 0)] * batch[name].ndim
  pad[axis] = (0, extra)
  x = np.moveaxis(np.pad(batch[name], pad), axis, 1)
  x[np.arange(x.shape[1]) >= size[:, None]] = value
  return batch | {name: np.moveaxis(x, 1, axis)}


CASES = {
  "conformer": (SPEECH["conformer"], ("features", "frames"), speech_batch, 4),
  "gru": (SPEECH["gru"], ("features", "frames"), speech_batch, 2),
  "line": (LINE, ("image", "widths"), line_batch, 4),
}


@pytest.mark.parametrize("name", ["conformer", "line", pytest.param("gru", marks=pytest.mark.slow)])
def test_padding_changes_no_valid_frame_no_gradient_and_no_statistics(name):
  make, inputs, batch_of, factor = CASES[name]
  _, variables = model_of(make, inputs)
  apply = apply_of(make, inputs, train=True)
  expected, gradient, state = apply(variables, batch_of())
  outputs, new_gradient, new_state = apply(variables, longer(batch_of(), inputs[0], 12, 1e3))
  lengths = -(-batch_of()[inputs[1]] // factor)
  np.testing.assert_array_equal(outputs["lengths"], lengths)
  for key in ("logits", "block1"):
    assert outputs[key].shape[1] > expected[key].shape[1]
    for row, length in enumerate(lengths):
      a, b = (x[key][row, :length] for x in (outputs, expected))
      np.testing.assert_allclose(a, b, atol=2e-5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, (new_gradient, new_state), (gradient, state))
  # The last valid frame matters.
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", CASES)
def test_without_lengths_all_frames_are_valid_and_larger_ones_count_as_all(name):
  make, inputs, batch_of, _ = CASES[name]
  model, variables = model_of(make, inputs)
  batch = batch_of()
  rows = len(batch[inputs[1]])

  @jax.jit
  def of_lengths(lengths):
    return model.apply(*variables, batch | {inputs[1]: lengths}, train=False, key=None)[0]

  without = from_nnx(lambda rngs: make(rngs=rngs), inputs=inputs[:1])
  plain = jax.jit(lambda: without.apply(*variables, batch, train=False, key=None)[0])()
  beyond = of_lengths(np.full(rows, 10**6))
  np.testing.assert_array_equal(plain["lengths"], plain["logits"].shape[1])
  for key in ("logits", "block1"):
    np.testing.assert_allclose(plain[key], beyond[key], atol=1e-5)
  empty = of_lengths(np.zeros(rows, int))
  np.testing.assert_array_equal(empty["lengths"], 0)
  assert all(np.isfinite(empty[key]).all() for key in ("logits", "block1"))


def test_depthwise_conv_equals_the_grouped_one():
  rng = np.random.default_rng(0)
  x, kernel, weights = (
    rng.normal(size=s).astype(np.float32) for s in ((2, 6, 3), (5, 3), (2, 6, 3))
  )

  def grouped(x, kernel):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
      x, kernel[:, None], (1,), "SAME", dimension_numbers=numbers, feature_group_count=3
    )

  def values(conv):
    def loss(x, kernel):
      return (jnp.sin(conv(x, kernel)) * weights).sum()

    return conv(x, kernel), jax.grad(loss, (0, 1))(x, kernel)

  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, values(depthwise_conv), values(grouped))


@pytest.mark.slow
def test_bfloat16_computes_wide_logits():
  network = SPEECH["conformer"](dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  wide = SPEECH["conformer"](rngs=nnx.Rngs(0))
  outputs, expected = (jax.jit(n)(speech_batch()["features"]) for n in (network, wide))
  assert outputs["block1"].dtype == jnp.bfloat16
  assert outputs["logits"].dtype == jnp.float32
  np.testing.assert_allclose(outputs["logits"], expected["logits"], atol=0.15)


@pytest.mark.parametrize(
  "field, make",
  [
    ("layer", lambda: FrameEncoderConfig(7, 8, 2, layer="lstm")),
    ("num_heads", lambda: FrameEncoderConfig(7, 10, 2)),
    ("embed_dim", lambda: FrameEncoderConfig(7, 9, 2, layer="gru")),
    ("kernel_size", lambda: FrameEncoderConfig(7, 8, 2, kernel_size=4)),
    ("dropout", lambda: FrameEncoderConfig(7, 8, 2, dropout=1.0)),
    ("subsampling", lambda: SpeechEncoder(CONFIG, subsampling=3, rngs=nnx.Rngs(0))),
    ("height", lambda: TextLineEncoder(CONFIG, height=24, rngs=nnx.Rngs(0))),
    ("widths", lambda: TextLineEncoder(CONFIG, widths=(), rngs=nnx.Rngs(0))),
    ("features", lambda: SPEECH["gru"](rngs=nnx.Rngs(0))(jnp.ones((2, 5, 7)))),
    ("frames", lambda: SPEECH["gru"](rngs=nnx.Rngs(0))(jnp.ones((2, 5, 6)), jnp.ones((2, 5)))),
    ("image", lambda: LINE(rngs=nnx.Rngs(0))(jnp.ones((2, 16, 22, 1)))),
    ("image", lambda: LINE(rngs=nnx.Rngs(0))(jnp.ones((2, 32, 24, 1)))),
    ("widths", lambda: LINE(rngs=nnx.Rngs(0))(jnp.ones((2, 16, 24, 1)), jnp.ones(3))),
  ],
)
def test_errors_name_the_field(field, make):
  with pytest.raises(ValueError, match=f"^{field}:"):
    make()
