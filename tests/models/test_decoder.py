"""The decoder against transformers' numbers, packed documents, the cache, sampling and what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from decoder_files import FAMILIES, TOKENS, weights
from flax import nnx

from distill_jax import losses
from distill_jax.models import from_nnx, load_weights, pretrained
from distill_jax.models.llm.decoder import Decoder, RopeScaling, logits
from distill_jax.models.llm.sampling import Generator, generate
from distill_jax.models.llm.weights import decoder_arguments, decoder_name

GOLDEN = json.loads(pathlib.Path(__file__).with_name("decoder_golden.json").read_text())
PACKED = ("tokens", "segments", "positions")
SMALL = {"vocabulary": 19, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "length": 64}


def small(**options):
  return lambda rngs: Decoder(**{**SMALL, **options}, rngs=rngs)


def built(**options):
  """A model with parameters far from their small beginnings."""
  model = from_nnx(small(**options), inputs="tokens")
  params = model.init(jax.random.key(0), {}).params
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    structure, [0.3 * jax.random.normal(k, x.shape) + (x == 1) for k, x in zip(keys, leaves)]
  )


def run(params, tokens, *packed, **options):
  model = from_nnx(small(**options), inputs=PACKED[: 1 + len(packed)])
  batch = dict(zip(PACKED, (jnp.asarray(tokens), *packed)))
  return jax.jit(lambda params, batch: model.apply(params, {}, batch, train=True, key=None)[0])(
    params, batch
  )


@pytest.fixture(params=FAMILIES)
def family(request):
  return request.param


@pytest.fixture
def released(family, tmp_path):
  """A Model from a checkpoint and the config.json that transformers would write beside it."""
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(weights(family), path)
  arguments = decoder_arguments(GOLDEN[family]["config"])
  model = from_nnx(lambda rngs: Decoder(**arguments, rngs=rngs), inputs="tokens")
  return arguments, pretrained(model, path, {}, names=decoder_name)


def test_a_released_checkpoint_gives_the_numbers_of_transformers(family, released):
  _, model = released
  out = jax.jit(lambda v, t: model.apply(*v, {"tokens": t}, train=False, key=None)[0])(
    model.variables, TOKENS[:1]
  )
  found = {"block1": out["block1"], "hidden": out["hidden"], "logits": logits(out)}
  found["attention2"] = jax.nn.softmax(out["attention2"])[:, :, -1]
  for name, value in found.items():
    expected = np.array(GOLDEN[family][name])
    np.testing.assert_allclose(
      value[0], expected, atol=3e-5 * max(1, np.abs(expected).max()), err_msg=name
    )


def test_greedy_continuations_are_those_of_transformers(family, released):
  arguments, model = released
  generator = Generator(lambda rngs: Decoder(**arguments, rngs=rngs))
  text = generator(model.variables.params, TOKENS.tolist(), 8)
  assert [row[24:] for row in text] == GOLDEN[family]["greedy"]
  assert [row[:24] for row in text] == TOKENS.tolist()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(weights("qwen3"), path)
  arguments = decoder_arguments(GOLDEN["llama"]["config"])
  like = jax.eval_shape(
    from_nnx(lambda rngs: Decoder(**arguments, rngs=rngs)).init, jax.random.key(0), {}
  )
  with pytest.raises(ValueError, match="unexpected: model.layers.0.self_attn.k_norm.weight"):
    load_weights(path, like, names=decoder_name)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "gemma2"}, "model_type 'gemma2': expected one of llama"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn'"),
  ],
)
def test_a_configuration_that_would_compute_something_else_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    decoder_arguments({**GOLDEN["llama"]["config"], **change})


def test_an_older_configuration_says_the_same():
  config = dict(GOLDEN["llama"]["config"])
  rope = dict(config.pop("rope_parameters"))
  config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
  assert decoder_arguments(config) == decoder_arguments(GOLDEN["llama"]["config"])


def test_outputs_have_their_documented_names_and_shapes():
  out = run(built(head_width=6), np.zeros((3, 5), int), head_width=6)
  each = {
    "block": (3, 5, 16),
    "attention": (3, 4, 5, 5),
    "queries": (3, 5, 24),
    "keys": (3, 5, 12),
    "values": (3, 5, 12),
  }
  shapes = {f"{name}{k}": shape for name, shape in each.items() for k in (1, 2)}
  shapes |= {"embedded": (3, 5, 16), "hidden": (3, 5, 16)}
  kernel, bias, softcap = out.pop("head")
  assert {name: value.shape for name, value in out.items()} == shapes
  assert kernel.shape == (16, 19) and bias is None and softcap is None


def test_packed_documents_do_not_attend_to_one_another(rng):
  params = built()
  documents = [rng.integers(0, 19, n) for n in (5, 3, 4)]
  tokens = np.concatenate(documents)[None]
  segments = np.repeat([4, 9, 2], [5, 3, 4])[None]
  positions = np.concatenate([np.arange(n) for n in (5, 3, 4)])[None]
  alone = [run(params, document[None])["hidden"][0] for document in documents]
  for packed in ((segments,), (segments, positions)):
    out = run(params, tokens, *map(jnp.asarray, packed))
    np.testing.assert_allclose(out["hidden"][0], np.concatenate(alone), rtol=1e-4, atol=1e-5)
    assert np.isneginf(out["attention1"][0, :, 5:8, :5]).all()
  changed = np.where(segments == 9, (tokens + 1) % 19, tokens)
  gradient = jax.grad(
    lambda e: run({**params, "embed": {"embedding": e}}, changed, segments)["hidden"][0, :5].sum()
  )(params["embed"]["embedding"])
  unused = np.setdiff1d(np.arange(19), documents[0])
  assert (gradient[unused] == 0).all()


def test_the_future_is_not_seen(rng):
  params, tokens = built(), rng.integers(0, 19, (1, 7))
  changed = tokens.copy()
  changed[0, 4] = (tokens[0, 4] + 1) % 19
  before, after = (run(params, t)["hidden"][0] for t in (tokens, changed))
  np.testing.assert_array_equal(before[:4], after[:4])
  assert (np.abs(before[4:] - after[4:]).max(-1) > 1e-4).all()


def test_blocks_computed_again_give_the_same(rng):
  params, tokens = built(tied=True), jnp.asarray(rng.integers(0, 19, (2, 6)))

  def loss(params, remat):
    out = run(params, tokens, tied=True, remat=remat)
    kernel, bias, cap = out["head"]
    labels = jnp.roll(tokens, -1, 1).ravel()
    return losses.linear_cross_entropy(
      out["hidden"].reshape(-1, 16), kernel, labels, bias=bias, softcap=cap
    )

  plain, again = (jax.value_and_grad(loss)(params, remat) for remat in ("", "nothing_saveable"))
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_blocks_computed_again_keep_less():
  def kept(remat):
    model = from_nnx(small(remat=remat), inputs="tokens")
    params = jax.eval_shape(model.init, jax.random.key(0), {}).params

    def pulled(params):
      tokens = jnp.zeros((8, 64), jnp.int32)
      return jax.vjp(
        lambda p: model.apply(p, {}, {"tokens": tokens}, train=True, key=None)[0]["hidden"], params
      )[1]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pulled, params)))

  assert kept("nothing_saveable") < 0.2 * kept("")


def test_low_precision_computes_low_and_stores_float32(rng):
  tokens = rng.integers(0, 19, (2, 6))
  params = built()
  out, wide = run(params, tokens, dtype=jnp.bfloat16), run(params, tokens)
  assert out["hidden"].dtype == out["head"][0].dtype == jnp.bfloat16
  assert out["attention1"].dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(params)} == {
    jnp.dtype("float32")
  }
  np.testing.assert_allclose(out["hidden"].astype(np.float32), wide["hidden"], atol=0.15)


def test_the_head_is_capped_where_asked(rng):
  tokens = rng.integers(0, 19, (1, 6))
  out = run(built(), tokens, softcap=0.5)
  assert out["head"][2] == 0.5
  z = out["hidden"] @ out["head"][0]
  np.testing.assert_allclose(logits(out), 0.5 * np.tanh(z / 0.5), rtol=1e-4, atol=1e-6)


def test_cached_keys_give_the_same_outputs(rng):
  params, tokens = built(projection_norm=True), rng.integers(0, 19, (2, 9))
  expected = run(params, tokens, projection_norm=True)["hidden"]
  decoder = nnx.merge(
    nnx.graphdef(nnx.eval_shape(lambda: small(projection_norm=True)(nnx.Rngs(0)))), params
  )
  cache = decoder.empty_cache(2, 12)
  starts = jnp.zeros(2, int)
  for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
    out, cache = jax.jit(decoder.extend)(tokens[:, part], starts, cache)
    np.testing.assert_allclose(out["hidden"], expected[:, part], rtol=1e-4, atol=1e-5)
    starts += part.stop - part.start


def test_greedy_is_the_most_probable_token_again_and_again(rng):
  params = built()
  generator = Generator(small())
  prompts = [list(map(int, rng.integers(0, 19, n))) for n in (3, 7)]
  texts = generator(params, prompts, 5)
  for prompt, text in zip(prompts, texts):
    assert text[: len(prompt)] == prompt and len(text) == len(prompt) + 5
    likely = logits(run(params, np.array([text]))).argmax(-1)[0]
    np.testing.assert_array_equal(text[len(prompt) :], likely[len(prompt) - 1 : -1])


def test_one_compilation_a_length_bucket():
  generator, params = Generator(small()), built()
  for length, most, temperature in [(3, 5, 0.0), (9, 2, 1.0), (20, 12, 0.5), (1, 31, 0.0)]:
    key = jax.random.key(length)
    texts = generator(params, [[1] * length] * 2, most, temperature=temperature, key=key)
    assert [len(text) for text in texts] == [length + most] * 2
  assert generator._run._cache_size() == 1
  generator(params, [[1] * 30] * 2, 4)
  generator(params, [[1] * 60] * 2, 4)
  assert generator._run._cache_size() == 2


def test_samples_follow_the_model():
  params = built()
  generator = Generator(small())
  texts = generator(params, [[5, 2]] * 4000, 1, temperature=2.0, key=jax.random.key(0))
  share = np.bincount([text[-1] for text in texts], minlength=19) / 4000
  p = jax.nn.softmax(logits(run(params, np.array([[5, 2]])))[0, -1] / 2)
  np.testing.assert_allclose(share, p, atol=4 * np.sqrt(0.25 / 4000))


def test_a_row_ends_behind_its_stop_token_and_at_the_end_of_its_place():
  params = built()
  free = Generator(small())(params, [[1, 2], [3]], 20)
  stop = free[0][6]
  texts = Generator(small(), stop=stop)(params, [[1, 2], [3]], 20)
  for text, longer, prompt in zip(texts, free, (2, 1)):
    end = longer.index(stop, prompt) + 1 if stop in longer[prompt:] else len(longer)
    assert text == longer[:end]
  decoder = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: small()(nnx.Rngs(0)))), params)
  tokens, lengths = jax.jit(lambda t, n: generate(decoder, t, n, 99))(
    jnp.full((2, 6), 7), jnp.array([6, 4])
  )
  np.testing.assert_array_equal(lengths, 6)
  np.testing.assert_array_equal(tokens[0], 7)


def test_unknown_tokens_are_nan_not_another_token():
  out = run(built(), np.array([[3, -1, 4], [3, 19, 4], [3, 18, 4]]))["hidden"]
  np.testing.assert_array_equal(np.isnan(out[:, 1:]).all((1, 2)), [True, True, False])


def test_long_wavelengths_are_stretched_and_short_ones_are_not():
  decoder = small(head_width=8, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32))(nnx.Rngs(0))
  positions = jnp.array([[1]])
  cos, sin = decoder._rotation(positions)
  angles = np.arctan2(sin, cos)[0, 0, 0]
  plain = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
  np.testing.assert_allclose(angles[[0, -1]], [plain[0], plain[-1] / 4], rtol=1e-5)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda r: Decoder(9, 16, 1, 4, kv_heads=3, rngs=r), "kv_heads=3 must divide heads=4"),
    (lambda r: Decoder(9, 15, 1, 4, rngs=r), "heads=4 must divide width=15"),
    (lambda r: Decoder(9, 12, 1, 4, rngs=r), "head_width=3 must be even"),
    (lambda r: Decoder(9, 16, 1, 4, remat="all", rngs=r), "no policy 'all'"),
    (lambda r: Decoder(9, 16, 1, 4, rngs=r)(jnp.zeros((2, 0), int)), r"tokens \(2, 0\)"),
    (
      lambda r: Decoder(9, 16, 1, 4, length=4, rngs=r)(jnp.zeros((1, 5), int)),
      "longer than the model's length=4",
    ),
    (
      lambda r: Decoder(9, 16, 1, 4, rngs=r)(jnp.zeros((1, 5), int), jnp.zeros((1, 4), int)),
      r"segments \(1, 4\)",
    ),
    (lambda r: Decoder(9, 16, 1, 4, length=4, rngs=r).empty_cache(1, 5), "a cache of 5 positions"),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))


@pytest.mark.parametrize(
  "prompts, most, options, message",
  [
    ([], 1, {}, "0 prompts"),
    ([[1], []], 1, {}, r"lengths \[1 0\]"),
    ([[1]], 0, {}, "most=0"),
    ([[1, 19]], 1, {}, "token 19 is outside the vocabulary of 19"),
    ([[1] * 60], 5, {}, "a prompt of 60 tokens and 5 more"),
    ([[1]], 1, {"temperature": 1.0}, "has a key"),
    ([[1]], 1, {"temperature": -1.0}, "temperature=-1.0"),
  ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, most, options, message):
  with pytest.raises(ValueError, match=message):
    Generator(small())({}, prompts, most, **options)
