"""Tests the encoder-decoder: cached steps, documented outputs, padding, gradients, arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import objectives
from distill_jax.models import from_nnx
from distill_jax.models.llm.head import head_logits
from distill_jax.models.seq2seq.cached_steps import decoder_steps
from distill_jax.models.seq2seq.encoder_decoder import INPUTS, EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import (
  EncoderDecoderConfig,
  RelativePositions,
)
from distill_jax.models.seq2seq.positions import relative_buckets
from distill_jax.types import Variables

SIZES = {"vocab_size": 19, "embed_dim": 12, "encoder_layers": 1, "decoder_layers": 1}
SIZES |= {"num_heads": 3, "max_length": 8, "start_token": 0, "end_token": 1}
FAMILIES = [
  ("plain", {"source_vocab_size": 23, "decoder_layers": 2}),
  ("t5", {"activation": "gated_gelu", "tie_embeddings": False, "head_dim": 5}),
  ("marian", {"activation": "swish", "dtype": jnp.bfloat16}),
]
RNG = np.random.default_rng(0)
SOURCE = RNG.integers(0, 19, (3, 7))
SEGMENTS = np.where(np.arange(7) < np.array([[7], [4], [0]]), 0, -1)
TOKENS = RNG.integers(0, 19, (3, 5))


@functools.cache
def network(family="plain", dtype=None, remat="", **arguments):
  """Returns the constructor, a Model, and parameters far from their small initial values."""
  config = EncoderDecoderConfig(**SIZES | arguments, family=family)

  def make(rngs):
    return EncoderDecoder(config, dtype=dtype, remat=remat, rngs=rngs)

  model = from_nnx(make, inputs=INPUTS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), {}).params
  rng = np.random.default_rng(1)
  values = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
  return make, model, jax.tree.map(values, shapes)


@functools.cache
def compiled(family="plain", **arguments):
  """Returns a jitted function of params and the inputs to the outputs and the steps' logits."""
  make, model, _ = network(family, **arguments)
  steps = decoder_steps(make)

  def run(params, *arrays):
    variables = Variables(params, {})
    batch = dict(zip(INPUTS, arrays))
    outputs = model.apply(*variables, batch, train=False, key=None)[0]

    def step(cache, inputs):
      logits, cache = steps.step(variables, *inputs, cache)
      return cache, logits

    length = batch["tokens"].shape[1]
    cache = steps.start(variables, batch, length)
    _, logits = jax.lax.scan(step, cache, (batch["tokens"].T, jnp.arange(length)))
    return outputs, head_logits(outputs), logits.swapaxes(0, 1)

  return jax.jit(run)


@pytest.mark.parametrize("family, arguments", FAMILIES)
def test_steps_equal_full_pass_and_padding_changes_nothing(family, arguments):
  run = compiled(family, **arguments)
  params = network(family, **arguments)[2]
  outputs, full, stepped = run(params, SOURCE, SEGMENTS, TOKENS)
  is_wide = "dtype" not in arguments
  tolerance = {"rtol": 1e-5, "atol": 1e-5} if is_wide else {"rtol": 0.05, "atol": 0.1}
  np.testing.assert_allclose(stepped, full, **tolerance)
  assert full.dtype == stepped.dtype == jnp.float32 and np.ptp(full) > 0.5
  assert outputs["hidden"].dtype == outputs["encoded"].dtype == arguments.get("dtype", jnp.float32)
  layers = range(1, 1 + arguments.get("decoder_layers", 1))
  shapes = {name: np.shape(value) for name, value in outputs.items() if name != "head"}
  assert shapes == {
    "encoder_block1": (3, 7, 12),
    "encoder_attention1": (3, 3, 7, 7),
    "encoded": (3, 7, 12),
    "hidden": (3, 5, 12),
    **{f"block{k}": (3, 5, 12) for k in layers},
    **{f"attention{k}": (3, 3, 5, 5) for k in layers},
    **{f"cross_attention{k}": (3, 3, 5, 7) for k in layers},
  }
  assert (np.isneginf(outputs["cross_attention1"]) == (SEGMENTS < 0)[:, None, None]).all()
  assert (np.isneginf(outputs["attention1"]) == np.triu(np.ones((5, 5)), 1)).all()
  other_padding = np.where(SEGMENTS < 0, 3, SOURCE)
  other_ends = np.where(np.arange(5) < 3, TOKENS, 2)
  _, other, _ = run(params, other_padding, SEGMENTS, other_ends)
  np.testing.assert_array_equal(other[:2, :3], full[:2, :3])
  assert (other[:2, 3:] != full[:2, 3:]).any()
  assert np.isfinite(full).all()  # The last source is empty.
  assert run._cache_size() == 1


def test_token_outside_of_vocabulary_makes_its_row_nan():
  run = compiled(*FAMILIES[0][:1], **FAMILIES[0][1])
  params = network("plain", **FAMILIES[0][1])[2]
  source, tokens = SOURCE.copy(), TOKENS.copy()
  source[0, 2] = 23
  tokens[1, 0] = -1
  _, full, stepped = run(params, source, SEGMENTS, tokens)
  assert np.isnan(full[:2]).all() and np.isfinite(full[2]).all()
  assert np.isnan(stepped[:2]).all() and np.isfinite(stepped[2]).all()


def test_objective_takes_it_and_trains_all_parameters():
  make, model, _ = network(remat="nothing_saveable")
  variables = model.init(jax.random.key(0), {})
  batch = dict(zip(INPUTS, (SOURCE, SEGMENTS, TOKENS)))
  batch["label"] = np.where(np.arange(5) < 4, np.roll(TOKENS, -1, 1), -1)
  term = objectives.tokens(None)

  def loss(params):
    outputs, state = model.apply(params, {}, batch, train=True, key=None)
    (values, where), _ = term.apply({}, {}, outputs, {}, batch, step=0, key=None)
    return jnp.where(where, values, 0).sum() / where.sum()

  value, gradients = jax.jit(jax.value_and_grad(loss))(variables.params)
  assert abs(value - np.log(19)) < 1.5  # Logits start with variance 1.
  for path, gradient in jax.tree.leaves_with_path(gradients):
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  "field, change",
  [
    ("source", {"source": np.zeros((3, 9), int), "source_segments": np.zeros((3, 9), int)}),
    ("source", {"source": np.zeros((3, 0), int), "source_segments": np.zeros((3, 0), int)}),
    ("source_segments", {"source_segments": np.zeros((3, 6), int)}),
    ("tokens", {"tokens": np.zeros((3, 9), int)}),
    ("tokens", {"tokens": np.zeros(3, int)}),
    ("source_segments", {"source_segments": np.asarray(SEGMENTS) >= 0}),
  ],
)
def test_rows_that_do_not_fit_raise(field, change):
  _, model, params = network()
  batch = dict(zip(INPUTS, (SOURCE, SEGMENTS, TOKENS))) | change
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    jax.eval_shape(lambda p: model.apply(p, {}, batch, train=False, key=None), params)


def test_steps_check_tokens_length_and_batch():
  make, _, params = network()
  variables = Variables(params, {})
  for field, arguments in (("start_token", {"start_token": 19}), ("end_token", {"end_token": -1})):
    with pytest.raises(ValueError, match=f"^{field}: "):
      decoder_steps(make, **arguments)
  with pytest.raises(ValueError, match="^end_token: expected a token, got None"):
    decoder_steps(network(end_token=None)[0])
  start = decoder_steps(make).start
  with pytest.raises(ValueError, match="^length: .*max_length=8"):
    start(variables, {"source": SOURCE, "source_segments": SEGMENTS}, 9)
  with pytest.raises(ValueError, match="'source_segments'"):
    start(variables, {"source": SOURCE}, 5)


@pytest.mark.parametrize(
  "field, arguments",
  [
    ("family", {"family": "bart"}),
    ("activation", {"activation": "geglu"}),
    ("vocab_size", {"vocab_size": 0}),
    ("decoder_layers", {"decoder_layers": 0}),
    ("source_vocab_size", {"source_vocab_size": -1}),
    ("max_length", {"max_length": 2.5}),
    ("num_heads", {"num_heads": 5}),
    ("embed_dim", {"embed_dim": 9}),
    ("start_token", {"start_token": 19}),
    ("relative", {"relative": RelativePositions()}),
    ("suppressed_tokens", {"suppressed_tokens": (19,)}),
  ],
)
def test_bad_setting_raises(field, arguments):
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    EncoderDecoderConfig(**SIZES | arguments)


@pytest.mark.parametrize("sizes", [(2, 128), (8, 4)])
def test_too_few_distances_raise(sizes):
  with pytest.raises(ValueError, match="^(num_buckets|max_distance): "):
    RelativePositions(*sizes)


def test_unknown_policy_raises():
  with pytest.raises(ValueError, match="^remat: "):
    network(remat="dots")


@pytest.mark.parametrize("causal", [True, False])
def test_relative_buckets_order_distances(causal):
  positions = jnp.arange(40)
  buckets = np.array(
    relative_buckets(positions, positions, RelativePositions(8, 20), causal=causal)
  )
  past = buckets[-1, ::-1]  # Of distances 0 to 39.
  count = 8 if causal else 4
  assert past[0] == 0 and past[-1] == past[20] == count - 1 and past[19 if causal else 20] > 0
  assert (np.diff(past) >= 0).all() and len(set(past)) == count
  future = buckets[0]
  np.testing.assert_array_equal(future[1:], 0 if causal else past[1:] + 4)
