"""Tests the decoder: documented outputs, packed documents, causality, the cache and its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoder import OPTIONS, PACKED, compiled, make, merge, random_params

from distill_jax import losses
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder, DecoderOptions
from distill_jax.models.llm.rope import RopeScaling, rotation

PARAMS = random_params()
LENGTHS = (5, 3, 4)
LENGTH = sum(LENGTHS)


def abstract(**arguments):
  """Returns the outputs' shapes for tokens [3, 5]; what is no array stays as it is."""
  model = from_nnx(make(**arguments), inputs="tokens")
  seen = {}

  def run():
    variables = model.init(jax.random.key(0), {})
    outputs = model.apply(*variables, {"tokens": jnp.zeros((3, 5), int)}, train=True, key=None)[0]
    seen["head"] = outputs["head"][1:]
    return variables, {**outputs, "head": outputs["head"][0]}

  variables, outputs = jax.eval_shape(run)
  return variables, {**outputs, "head": (outputs["head"], *seen["head"])}


def test_outputs_have_their_documented_names_and_shapes():
  options = dataclasses.replace(OPTIONS, softcap=0.5)
  _, outputs = abstract(head_dim=6, options=options)
  blocks = {
    "block": (3, 5, 16),
    "attention": (3, 4, 5, 5),
    "queries": (3, 5, 24),
    "keys": (3, 5, 12),
    "values": (3, 5, 12),
  }
  expected = {f"{name}{k}": shape for name, shape in blocks.items() for k in (1, 2)}
  expected |= {"embedded": (3, 5, 16), "hidden": (3, 5, 16)}
  kernel, bias, softcap = outputs.pop("head")
  assert {name: value.shape for name, value in outputs.items()} == expected
  assert kernel.shape == (16, 19) and bias is None and softcap == 0.5


def test_packed_documents_do_not_attend_to_one_another(rng):
  documents = [rng.integers(0, 19, n) for n in LENGTHS]
  tokens = np.concatenate(documents)[None]
  segments = np.repeat([4, 9, 2], LENGTHS)[None]
  positions = np.concatenate([np.arange(n) for n in LENGTHS])[None]
  # Attention is causal: a document at the beginning of a row does not depend on the padding after
  # it.
  rows = np.stack([np.pad(d, (0, LENGTH - len(d))) for d in documents])
  separate = compiled()(PARAMS, rows)["hidden"]
  expected = np.concatenate([hidden[:n] for hidden, n in zip(separate, LENGTHS)])
  for packed in ((segments,), (segments, positions)):
    outputs = compiled(1 + len(packed))(PARAMS, tokens, *packed)
    np.testing.assert_allclose(outputs["hidden"][0], expected, rtol=1e-4, atol=1e-5)
    assert np.isneginf(outputs["attention1"][0, :, 5:8, :5]).all()


def test_gradients_stay_in_the_document_and_reach_it(rng):
  tokens = np.concatenate([rng.integers(0, 10, 5), rng.integers(10, 19, 7)])[None]
  segments = np.repeat([4, 9, 2], LENGTHS)[None]
  model = from_nnx(make(), inputs=PACKED[:2])

  def first_document(params):
    batch = {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments)}
    return model.apply(params, {}, batch, train=True, key=None)[0]["hidden"][0, :5].sum()

  gradient = np.asarray(jax.jit(jax.grad(first_document))(PARAMS)["embed"]["embedding"])
  own = np.unique(tokens[0, :5])
  assert (gradient[np.setdiff1d(np.arange(19), own)] == 0).all()
  assert (np.abs(gradient[own]).max(-1) > 0).all()


def test_outputs_do_not_depend_on_later_tokens(rng):
  tokens = np.repeat(rng.integers(0, 19, (1, LENGTH)), 3, 0)
  tokens[1, 4] = (tokens[0, 4] + 1) % 19
  before, after, _ = compiled()(PARAMS, tokens)["hidden"]
  np.testing.assert_array_equal(before[:4], after[:4])
  assert (np.abs(before[4:] - after[4:]).max(-1) > 1e-4).all()


def test_unknown_tokens_give_nan():
  tokens = np.full((3, LENGTH), 3)
  tokens[:, 1] = -1, 19, 18
  hidden = compiled()(PARAMS, tokens)["hidden"]
  np.testing.assert_array_equal(np.isnan(hidden[:, 1:]).all((1, 2)), [True, True, False])


def test_rematerialized_blocks_give_the_same_gradients(rng):
  params = random_params(tie_embeddings=True)
  tokens = jnp.asarray(rng.integers(0, 19, (2, 6)))

  def loss(params, remat):
    model = from_nnx(make(tie_embeddings=True, remat=remat), inputs="tokens")
    outputs = model.apply(params, {}, {"tokens": tokens}, train=True, key=None)[0]
    labels = jnp.roll(tokens, -1, 1).ravel()
    return losses.linear_cross_entropy(outputs["hidden"].reshape(-1, 16), outputs["head"], labels)

  @jax.jit
  def both(params):
    return [jax.value_and_grad(loss)(params, remat) for remat in ("", "nothing_saveable")]

  plain, again = both(params)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rematerialized_blocks_store_less():
  def stored(remat):
    model = from_nnx(make(remat=remat), inputs="tokens")
    params = jax.eval_shape(model.init, jax.random.key(0), {}).params
    batch = {"tokens": jnp.zeros((8, 64), jnp.int32)}

    def residuals(params):
      def hidden(p):
        return model.apply(p, {}, batch, train=True, key=None)[0]["hidden"]

      return jax.vjp(hidden, params)[1]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, params)))

  assert stored("nothing_saveable") < 0.2 * stored("")


def test_low_precision_computes_low_and_stores_float32(rng):
  tokens = rng.integers(0, 19, (3, LENGTH))
  variables, outputs = abstract(dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert outputs["hidden"].dtype == outputs["head"][0].dtype == jnp.bfloat16
  assert outputs["attention1"].dtype == jnp.float32
  low = compiled(dtype=jnp.bfloat16)(PARAMS, tokens)["hidden"].astype(np.float32)
  np.testing.assert_allclose(low, compiled()(PARAMS, tokens)["hidden"], atol=0.15)


def test_cached_keys_give_the_same_outputs(rng):
  params = random_params(qk_norm=True)
  tokens = rng.integers(0, 19, (2, 9))
  expected = compiled(qk_norm=True)(params, tokens)["hidden"]
  decoder = merge(params, qk_norm=True)
  extend = jax.jit(decoder.extend)
  cache = decoder.init_cache(2, 12)
  starts = jnp.zeros(2, int)
  for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
    outputs, cache = extend(tokens[:, part], starts, cache)
    np.testing.assert_allclose(outputs["hidden"], expected[:, part], rtol=1e-4, atol=1e-5)
    starts += part.stop - part.start


def test_rope_scaling_stretches_only_long_wavelengths():
  _, sin = rotation(jnp.array([[1]]), 8, 10_000.0, RopeScaling(4.0, 1.0, 4.0, 32))
  angles = np.arcsin(sin)[0, 0, 0]
  plain = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
  np.testing.assert_allclose(angles[[0, -1]], [plain[0], plain[-1] / 4], rtol=1e-5)


SHORT = DecoderOptions(max_length=4)


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda r: Decoder(9, 16, 1, 4, num_kv_heads=3, rngs=r), "num_kv_heads"),
    (lambda r: Decoder(9, 15, 1, 4, rngs=r), "num_heads"),
    (lambda r: Decoder(9, 12, 1, 4, rngs=r), "head_dim"),
    (lambda r: Decoder(9, 16, 1, 4, remat="all", rngs=r), "remat"),
    (lambda r: Decoder(9, 16, 1, 4, rngs=r)(jnp.zeros((2, 0), int)), "tokens"),
    (
      lambda r: Decoder(9, 16, 1, 4, options=SHORT, rngs=r)(jnp.zeros((1, 5), int)),
      "tokens: .*max_length=4",
    ),
    (
      lambda r: Decoder(9, 16, 1, 4, rngs=r)(jnp.zeros((1, 5), int), jnp.zeros((1, 4), int)),
      "segments",
    ),
    (lambda r: Decoder(9, 16, 1, 4, options=SHORT, rngs=r).init_cache(1, 5), "length: .*=4"),
  ],
)
def test_invalid_arguments_raise(call, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    nnx.eval_shape(lambda: call(nnx.Rngs(0)))
