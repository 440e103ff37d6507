"""Checks logits that are encoded from hidden states and a head, a few tokens at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_models import LENGTH, VOCABULARY, language_model, logits_of, token_rows, with_params

from distill_jax import losses
from distill_jax.cache import Dense, RandomSampling, TopK, open_cache, verify, write_cache
from distill_jax.cache.codecs import output_errors
from distill_jax.cache.teacher import lazy_logits
from distill_jax.cache.teacher.lazy_logits import LazyLogits
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.cache.teacher_inputs import ArrayInputs
from distill_jax.data import text

OUTPUTS = {
  "logits@top4": TopK(4),
  "logits@top9": TopK(9, 2.0, 16),
  "logits@samples": RandomSampling(5),
  "logits@int8": Dense("int8"),
  "hidden": Dense("float32"),
}


@pytest.fixture(scope="module")
def source():
  return token_rows(np.random.default_rng(0))


def teacher(seed, **kwargs):
  return language_model(seed, bias=True, softcap=30.0, **kwargs)


def set_chunk(monkeypatch, tokens):
  monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 4 * 8 * VOCABULARY * tokens)


@pytest.fixture
def chunks(monkeypatch):
  """Chunks of three tokens; the last one has one token."""
  set_chunk(monkeypatch, 3)


def write(folder, teacher, source, outputs=None):
  outputs = outputs or {"logits": TopK(4)}
  return write_cache(folder, teacher, source, outputs, batch_size=8, progress=False)


def records(cached):
  ids = cached.manifest.rows.ids
  return cached.row_reader.read(ids, 0 * ids)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, source):
  """Several codecs of the logits and hidden states of `teacher(2)`, in chunks."""
  with pytest.MonkeyPatch.context() as patch:
    set_chunk(patch, 3)
    return write(tmp_path_factory.mktemp("lazy") / "cache", teacher(2), source, OUTPUTS)


def test_columns_are_those_of_the_logits(cached, source):
  outputs = {name: codec for name, codec in OUTPUTS.items() if name != "hidden"}
  stored = records(cached)
  batch = ArrayInputs(source).batch(stored["id"], stored["view"])

  @jax.jit
  def encode_all(params, batch):
    model = teacher(2, logits=True)
    logits = model.apply(params, {}, batch, train=False, key=None)[0]["logits"]
    return {name: codec.encode(logits, batch) for name, codec in outputs.items()}

  expected = jax.device_get(encode_all(teacher(2).variables.params, batch))
  for name, columns in expected.items():
    for part, values in columns.items():
      # The normalizer's sum depends on the shape of its program, and so does a code's rounding.
      if part != "codes":
        tolerance = 1e-5 * (values.dtype.kind == "f")
        np.testing.assert_allclose(
          stored[f"{name}.{part}"], values, tolerance, 0.1 * tolerance, err_msg=part
        )
  codec = outputs["logits@top4"]
  spec = cached.outputs["logits@top4"][1]
  spec = jax.ShapeDtypeStruct((len(stored), *spec.shape), spec.dtype)
  columns = {part: stored[f"logits@top4.{part}"] for part in expected["logits@top4"]}
  chunked, full = (codec.decode(x, spec) for x in (columns, expected["logits@top4"]))
  np.testing.assert_allclose(chunked.log_probs, full.log_probs, atol=codec.max_error(30.0))
  has_label = batch["label"] >= 0
  assert ((stored["logits@top4.label_log_prob"] <= 0) == has_label).all()


def test_one_output_is_stored_in_several_ways(cached, source):
  live = teacher(2)
  columns = cached.add_columns({"id": source.ids[:8]})
  model = open_cache(cached.store.url).model
  decoded = model.apply(*model.variables, columns, train=False, key=None)[0]
  assert set(OUTPUTS) <= set(decoded)
  batch = {"id": source.ids[:8], "tokens": source.arrays["tokens"][:8]}
  outputs = live.apply(*live.variables, batch, train=False, key=None)[0]
  logits = logits_of(outputs["hidden"], *outputs["head"])
  for name in ("logits@top4", "logits@top9"):
    codec = OUTPUTS[name]
    expected = losses.top_k(logits, codec.k, temperature=codec.temperature)
    np.testing.assert_array_equal(decoded[name].indices, expected.indices)
    assert decoded[name].temperature == codec.temperature
  assert decoded["logits@samples"].sampled
  assert decoded["logits@samples"].indices.shape == (8, LENGTH, 5)
  np.testing.assert_array_equal(decoded["hidden"], outputs["hidden"])
  stand_in = with_cached_outputs(live, OUTPUTS)
  shapes = jax.eval_shape(
    lambda batch: stand_in.apply(*live.variables, batch, train=False, key=None)[0], batch
  )
  for name in OUTPUTS:
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes[name]) == jax.tree.map(
      lambda x: (x.shape, x.dtype), decoded[name]
    )


def test_verify_compares_a_few_tokens_at_a_time(cached, source, chunks):
  same = verify(cached, teacher(2), source, 24, batch_size=8)
  assert same["logits@top4"].difference < 0.05 and same["logits@top4"].kl < 1e-2
  assert same["logits@top9"].difference < 1e-3 and same["logits@top9"].kl < 1e-5
  assert same["logits@top4"].top1 == same["logits@top9"].top1 == 1
  assert same["logits@int8"].kl < 1e-2 and same["logits@int8"].top1 > 0.9
  assert same["logits@samples"].difference == 0
  other = verify(cached, teacher(4), source, 24, batch_size=8)
  assert other["logits@top4"].top1 < 0.5
  assert other["logits@int8"].kl > 0.1
  assert other["logits@samples"].difference > 0.5


@pytest.mark.parametrize("tokens", [0, 3, LENGTH])
def test_chunks_cover_every_token_once(rng, monkeypatch, tokens):
  monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 4 * 8 * 5 * tokens)
  hidden = jnp.asarray(rng.normal(size=(8, LENGTH, 2)), jnp.float32)
  output = LazyLogits(hidden, (jnp.zeros((2, 5)), None, None))
  sizes = []

  def positions(logits, first, numbers):
    sizes.append(logits.shape[1])
    return first + jnp.arange(logits.shape[1]) + 0 * numbers, numbers

  numbers = jnp.tile(jnp.arange(LENGTH), (8, 1))
  for result in lazy_logits.map_token_chunks(positions, output, numbers):
    np.testing.assert_array_equal(result, numbers)
  assert set(sizes) == {max(1, tokens)}


def test_an_invalid_output_is_found_in_any_chunk(tmp_path, chunks):
  # Only row 1 has a 'q', at position 8.
  source = text.pack([[97] * 20 + [ord("q")], [98] * 40], length=LENGTH)
  teacher = language_model(5)
  tokens = teacher.variables.params["token"].at[ord("q")].set(np.nan)
  with pytest.raises(ValueError, match=r"'logits'.* id 1, view 0 .*NaN"):
    write(tmp_path, with_params(teacher, token=tokens), source)


def test_the_first_error_of_an_examples_tokens_is_returned():
  hidden = np.zeros((8, LENGTH, 2), np.float32)
  hidden[3, 5] = np.nan
  # A bias of -inf leaves no class to any token, but NaN comes first.
  head = jnp.zeros((2, 5)), jnp.full(5, -jnp.inf), None

  @jax.jit
  def errors_of(hidden):
    return lazy_logits.encode_output({"top": TopK(1)}, LazyLogits(hidden, head), {})["top"][1]

  errors = errors_of(hidden)
  expected = np.full(8, output_errors.NO_CLASS)
  expected[3] = output_errors.NOT_FINITE
  np.testing.assert_array_equal(errors, expected)


@pytest.mark.parametrize(
  ("outputs", "match"),
  [
    ({"logits": TopK(VOCABULARY + 1)}, r"k: .*1 to 257.*got 258"),
    ({"logits@": TopK(1)}, r"outputs\['logits@'\]"),
    ({"logits@t1.5": TopK(1)}, r"outputs\['logits@t1\.5'\]"),
    ({"logit@top8": TopK(1)}, "outputs: .*'logit'"),
  ],
)
def test_impossible_outputs_are_rejected_early(tmp_path, source, outputs, match):
  with pytest.raises(ValueError, match=match):
    write(tmp_path / "none", language_model(0), source, outputs)
  assert not (tmp_path / "none").exists()


def test_logits_are_never_held_at_once():
  # 8 rows of 64 tokens of 32,768 classes: 64 MiB of logits in float32 for each token of a row.
  shapes = (
    jax.ShapeDtypeStruct((8, 512, 16), jnp.float32),
    jax.ShapeDtypeStruct((16, 32_768), jnp.float32),
  )
  batch = {name: jax.ShapeDtypeStruct((8,), jnp.int32) for name in ("id", "view")}
  codecs = {"top": TopK(8), "more": TopK(64), "samples": RandomSampling(8)}
  program = jax.jit(
    lambda hidden, kernel, batch: lazy_logits.encode_output(
      codecs, LazyLogits(hidden, (kernel, None, None)), batch
    )
  )
  memory = program.lower(*shapes, batch).compile().memory_analysis().temp_size_in_bytes
  assert memory < 6 * lazy_logits.CHUNK_BYTES < 0.8 * 4 * 8 * 512 * 32_768
