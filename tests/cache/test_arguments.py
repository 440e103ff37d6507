"""Checks that arguments, data and batches that do not fit a cache are rejected by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import ROWS, linear, student, written

from distill_jax import data, losses, objectives, teachers
from distill_jax.cache import (
  Dense,
  Mismatch,
  TopK,
  check_run,
  check_teacher_weights,
  describe,
  estimate,
  verify,
  write_cache,
)
from distill_jax.models.adapters.outputs import as_outputs
from distill_jax.train import fit


@pytest.mark.parametrize(
  "changed, match",
  [
    (dict(batch_size=0), "batch_size: .*got 0"),
    (dict(batch_size=1.5), "batch_size: .*got 1.5"),
    (dict(batch_size=12), r"batch_size: .*8 or 16"),
    (dict(num_views=0), "num_views: .*got 0"),
    (dict(num_views=2), "num_views: .*1 without augmentation.*got 2"),
    (dict(outputs={}), "outputs: .*got none"),
    (dict(outputs=Dense()), "outputs: .*got Dense"),
    (dict(outputs={"logits": "float16"}), r"outputs\['logits'\]: .*got 'float16'"),
    (dict(outputs={"logit": Dense()}), "outputs: .*got 'logit'.*'logits'"),
    (dict(outputs={"logits": TopK(6)}), "k: .*1 to 5"),
    (dict(part=(3, 2)), r"part: .*got \(3, 2\)"),
    (dict(part=(2, 2)), r"part: .*got \(2, 2\)"),
    (dict(part=(-1, 2)), r"part: .*got \(-1, 2\)"),
    (dict(source=[{"image": np.zeros((4, 2))}]), "source: .*got list"),
    (dict(teacher=lambda x: x), "teacher: .*got function"),
    (dict(teacher=teachers.moving_average(student())), "teacher: .*EMA"),
    (dict(teacher=student()), "teacher: .*got none"),
  ],
)
def test_write_cache_rejects(tmp_path, source, changed, match):
  settings = {"teacher": linear(), "source": source, "progress": False, "batch_size": 16} | changed
  with pytest.raises(ValueError, match=match):
    write_cache(tmp_path / "new", **settings)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  ("pack", "match"),
  [
    (lambda z: (z, z), "outputs: .*tuple of 2"),
    (lambda z: [z], "outputs: .*list of 1"),
    (lambda z: (z, {"pair": (z, z)}), "outputs: .*'pair'.*tuple"),
  ],
)
def test_outputs_that_are_tuples_are_rejected(tmp_path, source, pack, match):
  plain = linear()

  def apply(*args, **kwargs):
    outputs, state = plain.apply(*args, **kwargs)
    return as_outputs(pack(outputs["logits"])), state

  teacher = plain._replace(apply=apply)
  with pytest.raises(ValueError, match=f"^{match}"):
    write_cache(tmp_path, teacher, source, outputs={"pair": Dense()}, progress=False)


def test_the_students_weights_are_rejected(tmp_path, cached, source):
  """A layer of another width would compute with them without an error (fault 32)."""
  teacher, student_variables = student(width=12), student().init(jax.random.key(0), {})
  match = r"teacher_variables: .*\(12, .*got .*\(8, .*'params/head/kernel'"
  with pytest.raises(ValueError, match=match):
    written(tmp_path / "new", source, teacher, teacher_variables=student_variables)
  with pytest.raises(ValueError, match=match):
    verify(cached, teacher, source, teacher_variables=student_variables, batch_size=16)
  with pytest.raises(Mismatch, match=r"teacher\.weights"):
    check_teacher_weights(cached, student_variables)


def test_verify_compares_a_part_of_the_examples(cached, source):
  part = source.take(slice(0, 25))
  agreement = verify(cached, linear(), part, ROWS, batch_size=16)["logits"]
  assert agreement == (25, pytest.approx(0, abs=1e-5), 0, 1)
  arrays = {**source.arrays, "id": np.arange(1000, 1000 + ROWS)}
  with pytest.raises(ValueError, match="source: .*none among the 60"):
    verify(cached, linear(), dataclasses.replace(source, arrays=arrays), batch_size=16)


@pytest.mark.parametrize(
  "changed, match",
  [
    (dict(batch_size=20), r"batch_size: .*16 or 24"),
    (dict(batch_size=0), "batch_size: .*got 0"),
    (dict(n=0), "n: .*got 0"),
    (dict(teacher={}), "teacher: .*got dict"),
    (dict(source=[]), "source: .*got list"),
    (
      dict(teacher=linear()._replace(apply=lambda *a, **k: ({"logit": 0}, {}))),
      "outputs: .*got 'logits'.*'logit'",
    ),
  ],
)
def test_verify_rejects(cached, source, changed, match):
  settings = {"teacher": linear(), "source": source, "batch_size": 16} | changed
  with pytest.raises(ValueError, match=match):
    verify(cached, **settings)


@pytest.mark.filterwarnings("error")
def test_describe_without_labels(cached, source):
  arrays = {**source.arrays, "label": np.full(ROWS, data.UNLABELED)}
  unlabeled = dataclasses.replace(source, arrays=arrays, ignore_label=data.UNLABELED)
  text = describe(cached, unlabeled)
  assert "nan" not in text and "accuracy on 0 labeled examples of toy: none" in text


def batch_of(source, rows=8):
  batch = {name: values[:rows] for name, values in source.arrays.items()}
  return batch | {"view": np.zeros(rows, np.int32)}


def without(batch, name):
  return {entry: x for entry, x in batch.items() if entry != name}


def test_a_batch_needs_the_keys_of_its_rows(cached, augmented, source):
  batch = batch_of(source)
  with pytest.raises(ValueError, match="batch: expected 'id', .*no 'id' in .*'image'"):
    cached.add_columns(without(batch, "id"))
  np.testing.assert_array_equal(
    cached.add_columns(without(batch, "view"))["teacher/logits.values"],
    cached.add_columns(batch)["teacher/logits.values"],
  )
  with pytest.raises(ValueError, match="batch: expected 'id' and 'view', .*no 'view'"):
    augmented.add_columns(without(batch, "view"))
  with pytest.raises(Mismatch, match=r"data\.inputs\.image: .*absent"):
    check_run(cached, without(batch, "image"))
  for wrong in (np.zeros(8), np.zeros((8, 1), int)):
    with pytest.raises(ValueError, match=r"id: expected integers \[B\]"):
      cached.add_columns({**batch, "id": wrong})


def test_a_padding_row_needs_no_example(cached, augmented, source):
  batch = batch_of(source)
  where = np.arange(8) < 6
  padded = {**batch, "id": np.where(where, batch["id"], -1)}
  with pytest.raises(ValueError, match="example id -1 .*'where'"):
    cached.add_columns(padded)
  columns = cached.add_columns({**padded, "where": where})
  name = "teacher/logits.values"
  np.testing.assert_array_equal(columns[name][:6], cached.add_columns(batch)[name][:6])
  np.testing.assert_array_equal(columns["id"], padded["id"])
  check_run(cached, {**padded, "where": where})
  columns = augmented.add_columns({**padded, "view": np.where(where, 1, -1), "where": where})
  expected = augmented.add_columns({**batch, "view": np.ones(8, np.int32)})
  np.testing.assert_array_equal(columns[name][:6], expected[name][:6])


def test_a_pipeline_without_ids_is_rejected(cached, source):
  def pipeline(start):
    return (without(batch, "id") for batch in data.batches(source, 16, seed=0, start=start))

  objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  with pytest.raises(ValueError, match="batch: .*'id'"):
    fit(student(), cached, objective, optax.sgd(0.1), pipeline, steps=2, batch_size=16)


def test_columns_without_their_decoder_are_rejected(cached, source):
  batch = cached.add_columns(batch_of(source))
  with pytest.raises(ValueError, match=r"'teacher/logits\.values'.*Cache\.model"):
    teachers.cached().apply({}, {}, batch, train=False, key=None)
  with pytest.raises(ValueError, match=r"batch: expected columns teacher/logits\."):
    cached.model.apply({}, {}, batch_of(source), train=False, key=None)


@pytest.mark.parametrize(
  "changed, match",
  [
    (dict(teacher=np.zeros(5, np.float32)), r"teacher: .*got float32 \[5\]"),
    (dict(teacher=np.zeros((0, 5), np.float32)), r"teacher: .*got float32 \[0, 5\]"),
    (dict(teacher=np.zeros((3, 5), int)), "teacher: .*got int"),
    (dict(teacher=np.full((3, 5), np.nan, np.float32)), "teacher: .*got 3 of 3"),
    (dict(student=np.zeros((3, 4), np.float32), codecs=[TopK(1)]), r"student \(3, 4\)|student: "),
    (dict(codecs=[]), "codecs: .*got none"),
    (dict(codecs=TopK(2)), "codecs: .*got TopK"),
    (dict(codecs=["float16"]), "codecs: .*got 'float16'"),
    (dict(temperature=0), "temperature: .*got 0"),
  ],
)
def test_estimate_rejects(changed, match):
  settings = {"teacher": jnp.ones((3, 5))} | changed
  with pytest.raises(ValueError, match=match):
    estimate(**settings)
