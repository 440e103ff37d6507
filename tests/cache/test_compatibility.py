"""Checks that a cache of another teacher, of other data or augmentation is rejected by field."""

import dataclasses

import numpy as np
import pytest
from toys import AUGMENT, CLASSES, ROWS, linear, written

from distill_jax import data
from distill_jax.cache import Dense, Mismatch, TopK, check_run, check_teacher, identity, vocabulary


def fields_of(caught):
  return [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]


def replaced(source, **arrays):
  return dataclasses.replace(source, arrays={**source.arrays, **arrays})


def test_each_field_that_differs_is_named(augmented, source):
  def fields(**changed):
    settings = {"source": source, "augment": AUGMENT, "num_views": 2} | changed
    with pytest.raises(Mismatch) as caught:
      written(augmented.store.url, **settings)
    return fields_of(caught)

  assert fields(teacher=linear(1)) == ["teacher.probe_outputs", "teacher.weights"]
  teacher = linear()
  doubled = teacher._replace(
    apply=lambda *args, **kwargs: ({"logits": 2 * teacher.apply(*args, **kwargs)[0]["logits"]}, {})
  )
  assert fields(teacher=doubled) == ["teacher.probe_outputs"]
  assert fields(description={"depth": 3}) == ["teacher.depth"]
  assert "outputs.logits.codec.dtype" in fields(outputs={"logits": Dense("float16")})
  assert fields(num_views=3) == ["num_views"]
  other = data.augmentation(data.shift_crop(1), data.flip(), seed=4)
  assert fields(augment=other) == ["augmentation.name", "augmentation.probes"]
  assert fields(source=dataclasses.replace(source, name="other")) == ["data.name"]
  assert fields(source=replaced(source, image=source.arrays["image"] + 1e-6)) == ["data.examples"]
  assert {"data.examples", "ids"} <= set(fields(source=source.take(slice(1, None))))
  # Labels are no inputs.
  relabeled = replaced(source, label=np.zeros(ROWS, int))
  written(augmented.store.url, relabeled, augment=AUGMENT, num_views=2)


def test_check_run_names_what_differs(augmented, source):
  def rejects(match, source=source, **changed):
    with pytest.raises(ValueError, match=match) as caught:
      check_run(augmented, source, **{"augment": AUGMENT} | changed)
    return caught

  check_run(augmented, source, augment=AUGMENT, num_views=2)
  rejects(r"augmentation\.name: .*shift_crop\(padding=1\)", augment=None)
  assert fields_of(rejects("augmentation", augment=None)) == [
    "augmentation.name",
    "augmentation.probes",
  ]
  rejects("num_views: expected 2.*got 3", num_views=3)
  rejects("mix", mix=data.mixup(1.0, CLASSES))
  rejects(r"data\.name: expected 'other', got 'toy'", dataclasses.replace(source, name="other"))
  # As many classes in another order stand for another tokenizer.
  rejects(r"data\.classes", dataclasses.replace(source, class_names=tuple("dcabe")))
  image = source.arrays["image"].copy()
  image[11] += 1
  rejects(rf"data: .*example id {source.ids[11]}\b", replaced(source, image=image))
  rejects("example id 1000 is not", replaced(source, id=np.arange(1000, 1000 + ROWS)))


def test_order_and_more_arrays_do_not_matter(cached, source):
  written(cached.store.url, source.take(np.arange(ROWS)[::-1]))
  check_run(cached, replaced(source, weight=np.ones(ROWS, np.float32)))
  flat = replaced(source, image=source.arrays["image"].reshape(ROWS, 16, 1, 1))
  with pytest.raises(Mismatch, match=r"data\.inputs\.image: .*16, 1, 1.*4, 4, 1"):
    check_run(cached, flat)


def test_another_tokenizer_of_the_same_size_is_rejected(tmp_path, source):
  """Its words have other numbers, so the cache would teach other words (fault 31)."""
  words = ["the", "a", "cat", "dog", "sat"]
  descriptions = [{"vocabulary": vocabulary(order)} for order in (words, words[::-1])]
  teacher, outputs = linear(), {"logits": TopK(2)}
  cached = written(tmp_path, source, teacher, outputs, description=descriptions[0])
  check_teacher(cached, teacher, teacher.variables, outputs, source.arrays, descriptions[0])
  with pytest.raises(Mismatch, match=r"teacher\.vocabulary"):
    written(tmp_path, source, teacher, outputs, description=descriptions[1])
  with pytest.raises(Mismatch, match=r"teacher\.vocabulary"):
    check_teacher(cached, teacher, teacher.variables, outputs, source.arrays, descriptions[1])
  with pytest.raises(Mismatch, match=r"outputs\.logits\.codec\.k: expected 3, got 2"):
    check_teacher(cached, teacher, teacher.variables, {"logits": TopK(3)}, source.arrays)


def test_a_batch_of_a_pipeline_is_compared(cached, source):
  batch = next(data.batches(source, 16, seed=0))
  check_run(cached, batch)
  with pytest.raises(Mismatch, match="example id"):
    check_run(cached, {**batch, "image": batch["image"] + 1})
  with pytest.raises(Mismatch, match=r"augmentation\.name"):
    check_run(cached, batch, augment=AUGMENT)


def test_views_that_cannot_be_repeated_are_rejected(tmp_path, source):
  rng = np.random.default_rng(0)

  def mixes_rows(batch):
    return {**batch, "image": batch["image"] - batch["image"].mean(0)}

  def is_random(batch):
    return {**batch, "image": batch["image"] + rng.normal()}

  for augment, match in (
    (mixes_rows, "augment: .*other rows"),
    (is_random, "augment: .*two calls"),
  ):
    with pytest.raises(ValueError, match=match):
      identity.augmentation_identity(augment, source.arrays)
  with pytest.raises(ValueError, match="augment"):
    written(tmp_path, source, augment=mixes_rows)


def test_same_value_allows_rounding_of_probes():
  assert identity.same_value("augmentation.probes", [1.0, 2.0], [1.0005, 2.0])
  assert not identity.same_value("augmentation.probes", [1.0, 2.0], [1.01, 2.0])
  assert identity.same_value("teacher.probe_outputs", [1.0, 2.0], [1.02, 2.0])
  assert not identity.same_value("teacher.probe_outputs", [1.0, 2.0], [1.5, 2.0])
  assert not identity.same_value("data.crop.probes", [1.0], [1.0, 1.0])
  assert not identity.same_value("data.name", "a", "b")
