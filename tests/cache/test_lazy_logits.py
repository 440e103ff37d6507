"""Logits kept from hidden states and a head, that nobody makes whole; one output kept in several ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_models import LENGTH, VOCABULARY, language_model, made, rows

from distill_jax import losses
from distill_jax.cache import Dense, RandomSampling, TopK, open_cache, verify, write_cache
from distill_jax.cache.teacher import lazy_logits
from distill_jax.cache.teacher.lazy_logits import LazyLogits
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.data import text

KEPT = {
  "logits@top4": TopK(4),
  "logits@top9": TopK(9, 2.0, 16),
  "logits@drawn": RandomSampling(5),
  "hidden": Dense("float32"),
}


@pytest.fixture
def source(rng):
  return rows(rng)


@pytest.fixture
def chunks(monkeypatch):
  """Three tokens at a time: the last chunk has one."""
  monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 4 * 8 * VOCABULARY * 3)


def written(folder, teacher, source, kept=None):
  return write_cache(
    folder, teacher, source, kept or {"logits": TopK(4)}, batch_size=8, progress=False
  )


def records(cached):
  ids = cached.manifest.rows.ids
  return cached.row_reader.read(ids, 0 * ids)


@pytest.mark.parametrize(
  ("codec", "options", "tokens"),
  [
    (TopK(4), {}, 3),
    (TopK(4), {}, LENGTH),
    (TopK(3, 2.0, 16), {"bias": True, "softcap": 30.0}, 1),
    (RandomSampling(5), {"bias": True, "softcap": 30.0}, 3),
    (Dense("int8"), {}, 3),
  ],
)
def test_columns_are_those_of_the_logits(tmp_path, source, monkeypatch, codec, options, tokens):
  monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 4 * 8 * VOCABULARY * tokens)
  kept = {"logits": codec}
  fused = written(tmp_path / "fused", language_model(1, **options), source, kept)
  whole = written(tmp_path / "whole", language_model(1, logits=True, **options), source, kept)
  a, b = records(fused), records(whole)
  assert [c.name for c in fused.manifest.columns] == [c.name for c in whole.manifest.columns]
  for name in set(a.dtype.names) - {
    "crc",
    "logits.codes",
  }:  # the normalizer's sum is rounded by the shape of its program
    np.testing.assert_allclose(
      a[name], b[name], rtol=1e-5 * (a[name].dtype.kind == "f"), err_msg=name
    )
  if isinstance(codec, TopK):
    one, other = (
      cached.model.apply({}, {}, cached.add_columns({"id": source.ids}), train=False, key=None)[0][
        "logits"
      ]
      for cached in (fused, whole)
    )
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=codec.max_error(30.0))
    assert ((a["logits.label_log_prob"] <= 0) == (source.arrays["label"] >= 0)).all()


def test_several_ways_to_keep_one_output_lie_side_by_side(tmp_path, source, chunks):
  teacher = language_model(2)
  cached = written(tmp_path, teacher, source, KEPT)
  batch = cached.add_columns({"id": source.ids[:8]})
  model = open_cache(tmp_path).model
  said = model.apply(*model.variables, batch, train=False, key=None)[0]
  assert set(KEPT) <= set(said)
  outputs = teacher.apply(
    *teacher.variables, {"tokens": source.arrays["tokens"][:8]}, train=False, key=None
  )[0]
  logits = made(outputs["hidden"], outputs["head"][0])
  for name in ("logits@top4", "logits@top9"):
    expected = losses.top_k(logits, KEPT[name].k, temperature=KEPT[name].temperature)
    np.testing.assert_array_equal(said[name].indices, expected.indices)
    assert said[name].temperature == KEPT[name].temperature
  assert said["logits@drawn"].sampled and said["logits@drawn"].indices.shape == (8, LENGTH, 5)
  np.testing.assert_array_equal(said["hidden"], outputs["hidden"])
  shown = jax.eval_shape(
    lambda b: with_cached_outputs(teacher, KEPT).apply(
      *teacher.variables, b, train=False, key=None
    )[0],
    {"id": source.ids[:8], "tokens": source.arrays["tokens"][:8]},
  )
  assert jax.tree.map(
    lambda x: (x.shape, x.dtype), {name: shown[name] for name in KEPT}
  ) == jax.tree.map(lambda x: (x.shape, x.dtype), {name: said[name] for name in KEPT})


def test_the_teacher_is_asked_again_a_few_tokens_at_a_time(tmp_path, source, chunks):
  teacher = language_model(3)
  kept = {"logits": TopK(4), "logits@drawn": RandomSampling(3), "logits@half": Dense("float16")}
  cached = written(tmp_path, teacher, source, kept)
  found = verify(cached, teacher, source, 24, batch_size=8)
  assert (
    found["logits"].difference < 0.05 and found["logits"].top1 == found["logits@half"].top1 == 1
  )
  assert found["logits"].kl < 1e-2 and found["logits@half"].kl < 1e-4
  assert found["logits@drawn"].difference == 0
  other = verify(cached, language_model(4), source, 24, batch_size=8)
  assert (
    other["logits"].top1 < 0.5
    and other["logits@half"].kl > 0.1
    and other["logits@drawn"].difference > 0.5
  )


def test_draws_of_a_part_of_the_tokens_are_those_of_all(rng):
  logits = jnp.asarray(rng.normal(size=(4, 7, 50)), jnp.float32)
  batch = {"id": jnp.arange(4), "view": jnp.zeros(4, int)}

  @functools.partial(jax.jit, static_argnums=1)
  def draw(x, first):
    return RandomSampling(6).decode(RandomSampling(6).encode(x, batch, first=first), x).indices

  np.testing.assert_array_equal(draw(logits[:, 3:5], 3), draw(logits, 0)[:, 3:5])


def test_what_cannot_be_kept_is_found_in_any_chunk(tmp_path, chunks):
  source = text.pack(
    [[97] * 20 + [ord("q")], [98] * 40], length=LENGTH
  )  # a 'q' at place 8 of row 1 alone
  teacher = language_model(5)
  kernel = teacher.variables.params["here"].at[ord("q")].set(np.nan)
  broken = teacher._replace(
    variables=teacher.variables._replace(params=teacher.variables.params | {"here": kernel})
  )
  with pytest.raises(ValueError, match="teacher output 'logits' of example id 1, view 0 holds NaN"):
    written(tmp_path, broken, source)


@pytest.mark.parametrize(
  ("kept", "message"),
  [
    (
      {"logits": TopK(VOCABULARY + 1)},
      r"k: expected 1 to 257, the classes of the output .*, got 258",
    ),
    (
      {"logits@": TopK(1)},
      r"outputs\['logits@'\]: expected letters, digits, '_' or '-' after the one '@'",
    ),
    ({"logits@t1.5": TopK(1)}, "after the one '@'"),
    ({"logit@top8": TopK(1)}, "the teacher gives no 'logit'"),
  ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path, source, kept, message):
  with pytest.raises(ValueError, match=message):
    written(tmp_path / "none", language_model(0), source, kept)
  assert not (tmp_path / "none").exists()


def test_the_logits_are_never_held_at_once():
  # 8 rows of 64 tokens of 32,768 classes: 64 MiB of logits in float32 for each token of a row.
  shapes = (
    jax.ShapeDtypeStruct((8, 512, 16), jnp.float32),
    jax.ShapeDtypeStruct((16, 32_768), jnp.float32),
  )
  batch = {name: jax.ShapeDtypeStruct((8,), jnp.int32) for name in ("id", "view")}
  for codecs in ({"top": TopK(8)}, {"top": TopK(8), "more": TopK(64), "drawn": RandomSampling(8)}):
    program = jax.jit(
      lambda h, w, b, codecs=codecs: lazy_logits.encode_output(codecs, LazyLogits(h, (w, None, None)), b)
    )
    taken = program.lower(*shapes, batch).compile().memory_analysis().temp_size_in_bytes
    print(list(codecs), f"{taken:,}")
    assert taken < 6 * lazy_logits.CHUNK_BYTES < 0.8 * 4 * 8 * 512 * 32_768
