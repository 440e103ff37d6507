"""Tests the encoder: documented outputs, padding, packed texts, gradients and its arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_config import EncoderConfig, ModernOptions

SIZES = {"vocab_size": 19, "embed_dim": 12, "num_layers": 2, "num_heads": 3, "max_length": 8}
ENTRIES = ("tokens", "segments", "token_types")
LENGTH = 6


@functools.cache
def network(entries=2, **arguments):
  """Returns a model, and parameters far from their small initial values."""
  config = EncoderConfig(**SIZES | arguments)
  model = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs=ENTRIES[:entries])
  shapes = jax.eval_shape(model.init, jax.random.key(0), {}).params
  rng = np.random.default_rng(1)
  values = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
  return model, jax.tree.map(values, shapes)


@functools.cache
def compiled(entries=2, **arguments):
  """Returns a jitted function of the first entries of ENTRIES."""
  model, params = network(entries, **arguments)

  def run(*arrays):
    return model.apply(params, {}, dict(zip(ENTRIES, arrays)), train=False, key=None)[0]

  return jax.jit(run)


def padded(*lengths):
  return np.where(np.arange(LENGTH) < np.array(lengths)[:, None], 0, -1)


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ({"pooler": False}, {}),
    ({"head": "sequence", "num_labels": 3}, {"pooled": (2, 12), "logits": (2, 3)}),
    ({"head": "tokens", "num_labels": 4}, {"logits": (2, 6, 4)}),
    (
      {"family": "modernbert", "head": "spans"},
      {"pooled": (2, 6, 12), "start": (2, 6), "end": (2, 6)},
    ),
    ({"head": "spans"}, {"start": (2, 6), "end": (2, 6)}),
  ],
)
def test_outputs_have_their_documented_names_and_shapes(arguments, expected):
  tokens = jnp.zeros((2, LENGTH), int)
  model, params = network(1, **arguments)
  apply = lambda p: model.apply(p, {}, {"tokens": tokens}, train=True, key=None)[0]  # noqa: E731
  outputs = jax.eval_shape(apply, params)
  blocks = dict.fromkeys(("block", "queries", "keys", "values"), (2, 6, 12))
  blocks["attention"] = (2, 3, 6, 6)
  expected = expected | {f"{name}{k}": shape for name, shape in blocks.items() for k in (1, 2)}
  expected |= {"embedded": (2, 6, 12), "hidden": (2, 6, 12), "embedding": (2, 12)}
  assert {name: value.shape for name, value in outputs.items()} == expected


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_padding_changes_nothing(family, rng):
  lengths = (LENGTH, 3)
  tokens = rng.integers(0, 19, (2, LENGTH))
  run = compiled(head="spans", family=family)
  outputs = run(tokens, padded(*lengths))
  tokens[1, 3:] = 5
  again = run(tokens, padded(*lengths))
  alone = compiled(1, head="spans", family=family)(tokens[1:, :3])
  np.testing.assert_array_equal(outputs["embedding"], again["embedding"])
  np.testing.assert_allclose(outputs["embedding"][1:], alone["embedding"], rtol=1e-4, atol=1e-5)
  for name in ("start", "end"):
    np.testing.assert_allclose(outputs[name][1:, :3], alone[name], rtol=1e-4, atol=1e-5)
    assert np.isneginf(outputs[name][1, 3:]).all()
  assert np.isneginf(outputs["attention1"][1, :, :3, 3:]).all()
  assert np.isfinite(outputs["attention1"][1, :, :3, :3]).all()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_packed_texts_do_not_attend_to_one_another(family, rng):
  texts = [rng.integers(0, 19, n) for n in (4, 2)]
  run = compiled(head="spans", family=family)
  packed = run(np.concatenate(texts)[None], np.repeat([3, 7], (4, 2))[None])["hidden"][0]
  rows = np.stack([np.pad(text, (0, LENGTH - len(text))) for text in texts])
  separate = run(rows, padded(4, 2))["hidden"]
  expected = np.concatenate([separate[0, :4], separate[1, :2]])
  np.testing.assert_allclose(packed, expected, rtol=1e-4, atol=1e-5)


def test_tokens_depend_on_both_sides_and_on_their_types(rng):
  tokens = np.repeat(rng.integers(0, 18, (1, LENGTH)), 3, 0)
  tokens[1, 3] += 1
  types = np.zeros_like(tokens)
  types[2, 3] = 1
  before, other_token, other_type = compiled(3)(tokens, np.zeros_like(tokens), types)["hidden"]
  for after in (other_token, other_type):
    assert (np.abs(before - after).max(-1) > 1e-5).all()


def test_values_outside_of_the_network_give_nan():
  tokens = np.full((4, LENGTH), 3)
  tokens[:, 1] = -1, 19, 18, 3
  segments = padded(LENGTH, LENGTH, LENGTH, 0)
  embedding = compiled()(tokens, segments)["embedding"]
  np.testing.assert_array_equal(np.isnan(embedding).all(1), [True, True, False, True])


def test_terms_of_layers_do_not_see_padding(rng):
  """Attention, relations and hidden states of a student and a teacher in one gradient."""
  pairs = [(1, 2), (2, 2)]
  objective = objectives.weighted(
    hidden=(1.0, objectives.layers(pairs, losses.hint)),
    attention=(1.0, objectives.attention(pairs, losses.attention_scores_mse)),
    relations=(1.0, objectives.relations([(2, 2)], relation_heads=2)),
  )
  (student, params), (teacher, teacher_params) = network(), network(embed_dim=24, token_types=0)
  segments = jnp.asarray(padded(LENGTH, 3))

  def loss(params, tokens):
    batch = {"tokens": tokens, "segments": segments}
    s, _ = student.apply(params, {}, batch, train=True, key=None)
    t, _ = teacher.apply(teacher_params, {}, batch, train=False, key=None)
    learned, state = objective.init(jax.random.key(0), s, t)
    terms, _ = objective.apply(learned, state, s, t, batch, step=0, key=jax.random.key(0))
    return sum(reduce.mean(*value) for _, value in terms.values())

  tokens = rng.integers(0, 19, (2, LENGTH))
  other = tokens.copy()
  other[1, 3:] = (tokens[1, 3:] + 1) % 19
  run = jax.jit(jax.value_and_grad(loss))
  value, gradient = run(params, jnp.asarray(tokens))
  other_value, other_gradient = run(params, jnp.asarray(other))
  assert value > 0 and np.isfinite(value)
  np.testing.assert_array_equal(value, other_value)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_maps_are_computed_only_where_they_are_read():
  model, params = network()
  batch = {"tokens": jnp.zeros((1, LENGTH), int), "segments": jnp.zeros((1, LENGTH), int)}

  def flops(name):
    run = lambda p: model.apply(p, {}, batch, train=False, key=None)[0][name]  # noqa: E731
    return jax.jit(run).lower(params).compile().cost_analysis()["flops"]

  assert flops("block1") < flops("attention2") < flops("hidden")


def test_low_precision_computes_low_and_stores_float32():
  config = EncoderConfig(**SIZES)
  model = from_nnx(lambda rngs: Encoder(config, dtype=jnp.bfloat16, rngs=rngs), inputs="tokens")

  def run():
    variables = model.init(jax.random.key(0), {})
    batch = {"tokens": jnp.zeros((1, 4), int)}
    return variables, model.apply(*variables, batch, train=True, key=None)[0]

  variables, outputs = jax.eval_shape(run)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert outputs["hidden"].dtype == outputs["embedding"].dtype == jnp.bfloat16
  assert outputs["attention1"].dtype == jnp.float32


@pytest.mark.parametrize(
  "arguments, field",
  [
    ({"vocab_size": 0}, "vocab_size"),
    ({"num_heads": 5}, "num_heads"),
    ({"family": "berd"}, "family: .*'bert'"),
    ({"head": "span"}, "head: .*'spans'"),
    ({"head": "sequence"}, "num_labels"),
    ({"num_labels": 2}, "num_labels"),
    ({"head": "spans", "num_labels": 3}, "num_labels"),
    ({"modern": ModernOptions()}, "modern"),
    ({"family": "modernbert", "token_types": 2}, "token_types"),
    ({"family": "modernbert", "num_heads": 4}, "num_heads"),
  ],
)
def test_invalid_configuration_raises(arguments, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    EncoderConfig(**SIZES | arguments)


@pytest.mark.parametrize(
  "arguments, lengths, field",
  [
    ({}, (9,), "tokens: .*max_length=8"),
    ({}, (4, 3), "segments"),
    ({"family": "distilbert"}, (4, 4, 4), "token_types"),
  ],
)
def test_invalid_rows_raise(arguments, lengths, field):
  config = EncoderConfig(**SIZES | arguments)
  rows = [jnp.zeros((1, n), int) for n in lengths]
  with pytest.raises(ValueError, match=f"^{field}"):
    nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))(*rows))
