"""Recurrent encoder-decoders: padding, steps, PyTorch's formula, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models import from_nnx
from distill_jax.models.decoding import beam_search, sampler, sequence_log_probs, target_rows
from distill_jax.models.llm.head import head_logits
from distill_jax.models.seq2seq.encoder_decoder import INPUTS
from distill_jax.models.seq2seq.recurrent import (
  GRU,
  RecurrentConfig,
  RecurrentEncoderDecoder,
  recurrent_steps,
)
from distill_jax.types import Variables

KINDS = {
  "attention": RecurrentConfig(11, 6, hidden_dim=8),
  "last_state": RecurrentConfig(11, 6, source_vocab_size=7, attention=False, bidirectional=False),
}

# The released network of g2p-en, in test_weights.py, is of the second kind.
CASES = ["attention", pytest.param("last_state", marks=pytest.mark.nightly)]


def maker(config):
  return lambda rngs: RecurrentEncoderDecoder(config, rngs=rngs)


@functools.cache
def model_of(kind):
  """Returns a Model and weights far from the small ones of its beginning."""
  model = from_nnx(maker(KINDS[kind]), inputs=INPUTS)
  params = jax.jit(model.init)(jax.random.key(0), {}).params
  return model, Variables(jax.tree.map(lambda x: 3 * x, params), {})


@functools.cache
def apply_of(kind):
  """Returns the compiled network."""
  model, _ = model_of(kind)
  return jax.jit(lambda variables, batch: model.apply(*variables, batch, train=False, key=None)[0])


def batch_of(rows=6, length=5, seed=0):
  rng = np.random.default_rng(seed)
  lengths = np.array([length, 1, *rng.integers(1, length + 1, rows - 2)])
  segments = np.where(np.arange(length) < lengths[:, None], 0, -1)
  return {
    "source": rng.integers(0, 7, (rows, length)),
    "source_segments": segments,
    "tokens": rng.integers(0, 11, (rows, 4)),
  }


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("kind", CASES)
def test_padding_changes_nothing(kind):
  _, variables = model_of(kind)
  batch = batch_of()
  outputs = apply_of(kind)(variables, batch)
  filled = np.where(batch["source_segments"] < 0, 3, batch["source"])
  close(apply_of(kind)(variables, batch | {"source": filled})["hidden"], outputs["hidden"])
  if kind == "attention":
    scores = outputs["cross_attention1"]
    assert scores.shape == (6, 1, 4, 5)
    np.testing.assert_array_equal(
      np.isneginf(scores),
      np.broadcast_to(batch["source_segments"][:, None, None] < 0, scores.shape),
    )
    short = {name: x[1:2] for name, x in batch.items()}
    short |= {name: short[name][:, :1] for name in ("source", "source_segments")}
    found = apply_of(kind)(variables, short)
    close(found["hidden"], outputs["hidden"][1:2])
    close(found["encoded"], outputs["encoded"][1:2, :1])
  without = {**batch, "source_segments": np.zeros_like(batch["source"])}
  assert np.abs(apply_of(kind)(variables, without)["hidden"] - outputs["hidden"]).max() > 0.01


@pytest.mark.parametrize("kind", CASES)
def test_steps_and_beams_agree_with_the_network(kind):
  _, variables = model_of(kind)
  batch = batch_of()
  steps = recurrent_steps(maker(KINDS[kind]), start_token=2, end_token=1)
  search = beam_search(steps, max_length=4, beam_size=3, length_penalty=0.0)
  beams = jax.jit(search)(variables, batch)
  for n in range(3):
    inputs, label = target_rows(beams.tokens[:, n], beams.lengths[:, n], start_token=2, end_token=1)
    outputs = apply_of(kind)(variables, batch | {"tokens": inputs})
    close(sequence_log_probs(outputs, label).sum(1), beams.scores[:, n], 1e-4)
  tokens, lengths = jax.jit(sampler(steps, max_length=4))(variables, None, batch)
  inputs, label = target_rows(tokens, lengths, start_token=2, end_token=1)
  outputs = apply_of(kind)(variables, batch | {"tokens": inputs})
  best = head_logits(outputs).argmax(-1)
  np.testing.assert_array_equal(jnp.where(label < 0, -1, best), label)


def test_unit_is_that_of_pytorch():
  """https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html, in numpy, from the end."""
  rng = np.random.default_rng(0)
  unit = GRU(3, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
  values = {}
  for name, layer in (("input", unit.input), ("state", unit.state)):
    values[name] = rng.normal(size=layer.kernel.shape), rng.normal(size=6)
    layer.kernel[...], layer.bias[...] = (jnp.asarray(x, jnp.float32) for x in values[name])
  x, h = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 2))
  states, last = unit(jnp.asarray(x, jnp.float32), jnp.asarray(h, jnp.float32), reverse=True)

  def sigmoid(z):
    return 1 / (1 + np.exp(-z))

  for position in (3, 2, 1, 0):
    of_input, of_state = (
      a @ kernel + bias for a, (kernel, bias) in zip((x[:, position], h), values.values())
    )
    r, z = sigmoid(of_input[:, :4] + of_state[:, :4]).reshape(2, 2, 2).swapaxes(0, 1)
    h = (1 - z) * np.tanh(of_input[:, 4:] + r * of_state[:, 4:]) + z * h
    close(states[:, position], h)
  close(last, h)


def test_gradients_of_an_empty_source_are_finite_in_bfloat16():
  config = KINDS["attention"]
  model = from_nnx(
    lambda rngs: RecurrentEncoderDecoder(config, dtype=jnp.bfloat16, rngs=rngs), inputs=INPUTS
  )
  batch = batch_of()
  batch["source_segments"] = np.where(np.arange(6)[:, None] == 0, -1, batch["source_segments"])
  _, variables = model_of("attention")

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    outputs, _ = model.apply(params, {}, batch, train=True, key=None)
    assert outputs["hidden"].dtype == outputs["encoded"].dtype == jnp.bfloat16
    assert outputs["cross_attention1"].dtype == jnp.float32
    return sequence_log_probs(outputs, jnp.asarray(batch["tokens"])).sum()

  assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(variables.params)))


@pytest.mark.parametrize(
  "field, sizes",
  [
    ("vocab_size", {"vocab_size": 0}),
    ("hidden_dim", {"hidden_dim": 7}),
    ("source_vocab_size", {"source_vocab_size": -1}),
  ],
)
def test_bad_sizes_are_refused_by_name(field, sizes):
  with pytest.raises(ValueError, match=field):
    RecurrentConfig(**{"vocab_size": 11, "embed_dim": 6, **sizes})


def test_bad_tokens_and_rows_are_refused_by_name():
  make = maker(KINDS["attention"])
  with pytest.raises(ValueError, match="end_token"):
    recurrent_steps(make, start_token=2, end_token=11)
  model, variables = model_of("attention")
  for name, length in (("source_segments", 4), ("tokens", 0)):
    batch = batch_of() | {name: np.zeros((6, length), int)}
    with pytest.raises(ValueError, match=name):
      jax.eval_shape(lambda batch: model.apply(*variables, batch, train=False, key=None), batch)
