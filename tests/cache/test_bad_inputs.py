"""Arguments in one another's place, counts of nothing, batches that lack what a cache needs: each named at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import AUGMENT, ROWS, images, linear, student, written

from distill_jax import data, losses, objectives, teachers
from distill_jax.cache import Dense, Mismatch, TopK, describe, estimate, verify, write_cache
from distill_jax.train import fit


@pytest.fixture
def source(rng):
  return images(rng)


@pytest.fixture
def cached(tmp_path, source):
  return written(tmp_path / "cache", source)


@pytest.mark.parametrize(
  "changed, message",
  [
    (dict(batch_size=0), "batch_size: expected a whole number from 1, got 0"),
    (dict(batch_size=1.5), "batch_size: expected a whole number from 1, got 1.5"),
    (dict(num_views=0), "num_views: expected a whole number from 1, got 0"),
    (dict(outputs={}), "outputs: expected at least one, such as .'logits': Dense"),
    (dict(outputs=Dense()), "outputs: expected a mapping .* such as .*; got Dense"),
    (
      dict(outputs={"logits": "float16"}),
      r"outputs\['logits'\]: expected Dense, TopK or RandomSampling, got 'float16'",
    ),
    (dict(part=(3, 2)), r"part: expected .index, count. with 0 <= index < count, got \(3, 2\)"),
    (dict(part=(-1, 2)), r"part: .* got \(-1, 2\)"),
    (
      dict(source={"image": np.zeros((4, 2))}),
      "source: expected a data.Source, .* or data.tokenized.PackedText, got dict",
    ),
    (dict(teacher=lambda x: x), "teacher: expected a Model, got function: wrap it with from_nnx"),
  ],
)
def test_a_cache_is_not_begun_with(tmp_path, source, changed, message):
  settings = {"teacher": linear(), "source": source, "progress": False, "batch_size": 16} | changed
  with pytest.raises(ValueError, match=message):
    write_cache(tmp_path / "new", **settings)
  assert not (tmp_path / "new").exists()


def test_the_student_s_weights_in_the_teacher_s_place_are_refused(tmp_path, cached, source):
  """A layer of another width computes with them and says nothing (fault 32)."""
  teacher, own = student(width=12), student().init(jax.random.key(0), {})
  message = r"teacher_variables: '0/.*' has shape \(.*8.*\), the teacher's has \(.*12.*\): these are another"
  with pytest.raises(ValueError, match=message):
    written(tmp_path / "new", source, teacher, teacher_variables=own)
  with pytest.raises(ValueError, match=message):
    verify(cached, teacher, source, teacher_variables=own, batch_size=16)
  with pytest.raises(ValueError, match="teacher.weights: .* in the cache"):
    cached.check_weights(own)


def test_verify_asks_about_a_part_of_the_examples(cached, source):
  part = source.take(slice(0, 25))
  assert verify(cached, linear(), part, ROWS, batch_size=16)["logits"] == (
    25,
    pytest.approx(0, abs=1e-5),
    0,
    1,
  )
  elsewhere = dataclasses.replace(
    source, arrays={**source.arrays, "id": np.arange(1000, 1000 + ROWS)}
  )
  with pytest.raises(
    ValueError, match="source: none of the 60 examples of 'toy' is in the cache in .*cache"
  ):
    verify(cached, linear(), elsewhere, batch_size=16)


@pytest.mark.parametrize(
  "changed, message",
  [
    (dict(batch_size=20), "batch_size 20 does not divide over 8 devices.*nearest: 16 or 24"),
    (dict(batch_size=0), "batch_size: expected a whole number from 1, got 0"),
    (dict(n=0), "n: expected a whole number from 1, got 0"),
    (dict(teacher={}), "teacher: expected a Model, got dict"),
    (dict(source={}), "source: expected a data.Source, .* or data.tokenized.PackedText, got dict"),
    (
      dict(teacher=linear()._replace(apply=lambda *a, **k: ({"logit": 0}, {}))),
      "gives no 'logits'; did you mean",
    ),
  ],
)
def test_verify_does_not_begin_with(cached, source, changed, message):
  settings = {"teacher": linear(), "source": source, "batch_size": 16} | changed
  with pytest.raises(ValueError, match=message):
    verify(cached, **settings)


@pytest.mark.filterwarnings("error")
def test_the_description_says_that_there_are_no_labels(cached, source):
  unlabeled = {**source.arrays, "label": np.full(ROWS, data.UNLABELED)}
  text = describe(
    cached, dataclasses.replace(source, arrays=unlabeled, ignore_label=data.UNLABELED)
  )
  assert "nan" not in text and "accuracy on the 0 labeled examples of toy, which has none" in text


def batch_of(source, rows=8):
  return {name: values[:rows] for name, values in source.arrays.items()} | {
    "view": np.zeros(rows, np.int32)
  }


def without(batch, name):
  return {entry: x for entry, x in batch.items() if entry != name}


def test_a_batch_that_lacks_what_rows_are_found_by(tmp_path, cached, source):
  batch = batch_of(source)
  with pytest.raises(
    ValueError, match="no 'id': rows of the cache in .* are found by 'id'; it has .*'image'"
  ):
    cached.join(without(batch, "id"))
  np.testing.assert_array_equal(
    cached.join(without(batch, "view"))["teacher/logits.values"],
    cached.join(batch)["teacher/logits.values"],
  )
  augmented = written(tmp_path / "augmented", source, augment=AUGMENT, num_views=2)
  with pytest.raises(
    ValueError, match="no 'view': rows of the cache in .* are found by 'id' and 'view'; it has"
  ):
    augmented.join(without(batch, "view"))
  with pytest.raises(
    Mismatch, match="data.inputs.image: 'float32.*' in the cache, '.absent.' wanted"
  ):
    cached.check(without(batch, "image"))
  with pytest.raises(ValueError, match=r"id: expected integers \[B\], got float64 \[8\]"):
    cached.join({**batch, "id": np.zeros(8)})


def test_a_row_that_only_fills_up_its_batch_needs_no_example(cached, source):
  batch = batch_of(source)
  padded = {**batch, "id": np.where(np.arange(8) < 6, batch["id"], -1)}
  with pytest.raises(
    ValueError, match="example id -1 is not in the cache: .* must be False in 'where'"
  ):
    cached.join(padded)
  joined = cached.join({**padded, "where": np.arange(8) < 6})
  np.testing.assert_array_equal(
    joined["teacher/logits.values"][:6], cached.join(batch)["teacher/logits.values"][:6]
  )
  np.testing.assert_array_equal(joined["id"], padded["id"])
  cached.check({**padded, "where": np.arange(8) < 6})


def test_a_pipeline_without_ids_is_refused_before_training(cached, source):
  def pipeline(start):
    return (without(batch, "id") for batch in data.batches(source, 16, seed=0, start=start))

  objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  with pytest.raises(ValueError, match="the batch has no 'id'"):
    fit(
      student(), cached, objective, optax.sgd(0.1), pipeline, steps=2, batch_size=16, progress=False
    )


def test_columns_that_are_not_decoded_are_no_outputs(cached, source):
  with pytest.raises(
    ValueError, match="'teacher/logits.values' .* of a cache: .* is `Cache.model`"
  ):
    teachers.cached().apply({}, {}, cached.join(batch_of(source)), train=False, key=None)


@pytest.mark.parametrize(
  "changed, message",
  [
    (
      dict(teacher=np.zeros(5, np.float32)),
      r"teacher: expected logits \[N, ..., V\].* got float32 \[5\]",
    ),
    (dict(teacher=np.zeros((0, 5), np.float32)), r"teacher: .* got float32 \[0, 5\]"),
    (dict(teacher=np.zeros((3, 5), int)), "teacher: .* got int"),
    (
      dict(teacher=np.full((3, 5), np.nan, np.float32)),
      "teacher: 3 of the 3 examples hold NaN or .inf",
    ),
    (dict(codecs=[]), "codecs: expected at least one of Dense, TopK and RandomSampling, got none"),
    (
      dict(codecs=TopK(2)),
      "codecs: expected a sequence of Dense, TopK and RandomSampling, got TopK",
    ),
    (dict(codecs=["float16"]), "codecs: expected .*, got 'float16'"),
    (dict(temperature=0), "temperature: expected a finite number > 0, got 0"),
  ],
)
def test_an_estimate_is_not_made_of(changed, message):
  settings = {"teacher": jnp.ones((3, 5))} | changed
  with pytest.raises(ValueError, match=message):
    estimate(**settings)
