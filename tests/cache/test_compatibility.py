"""Checks that a cache of another teacher, of other data or augmentation is rejected by field."""

import dataclasses

import numpy as np
import pytest
from toys import AUGMENT, CLASSES, ROWS, linear, written

from distill_jax import data
from distill_jax.cache import Dense, Mismatch, TopK, check_run, check_teacher, identity, vocabulary
from distill_jax.cache.probes import probe_batch
from distill_jax.models import from_apply


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
  assert fields(source=replaced(source, image=source.arrays["image"] + 1e-6)) == [
    "data.examples.image"
  ]
  assert {"data.examples.id", "data.examples.image", "ids"} <= set(
    fields(source=source.take(slice(1, None)))
  )
  # Labels are no inputs.
  relabeled = replaced(source, label=np.zeros(ROWS, int))
  written(augmented.store.url, relabeled, augment=AUGMENT, num_views=2)


def test_check_run_names_what_differs(augmented, source):
  def rejects(match, source=source, **changed):
    with pytest.raises(ValueError, match=match) as caught:
      check_run(augmented, source, **{"augment": AUGMENT} | changed)
    return caught

  check_run(augmented, source, augment=AUGMENT, num_views=2)
  rejects(r"augmentation\.name: .*shift_crop\(.*padding=1\)", augment=None)
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


def test_names_that_classes_have_by_default_do_not_matter():
  numbered = data.Source({"x": np.ones(3), "label": np.arange(3)}, classes=3).class_names
  assert identity.vocabulary(numbered) == identity.vocabulary(())
  assert identity.vocabulary(("1", "0", "2")) != identity.vocabulary(())


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


def test_entries_that_the_teacher_does_not_read_do_not_matter(tmp_path, source):
  """A corrected label voided the cache where it was an entry of its own."""
  kernel = np.random.default_rng(0).normal(size=(16, CLASSES)).astype(np.float32)

  def apply(w, image, mask):
    rows = (image * mask).reshape(len(image), -1)
    return rows @ w, {"hidden": rows}

  teacher = from_apply(None, apply, variables=kernel, inputs=("image", "mask"))
  arrays = {"mask": np.ones((ROWS, 4, 4, 1), np.float32), "type": np.zeros(ROWS, int)}
  examples = replaced(source, **arrays, thumb=np.zeros((ROWS, 4, 4, 1), np.float32))
  augment = data.augmentation(data.flip(), seed=0, entries=("image", "mask"))
  settings = dict(teacher=teacher, augment=augment)
  cached = written(tmp_path, examples, **settings)
  assert sorted(cached.manifest.identity["data"]["inputs"]) == ["image", "mask"]
  other = replaced(examples, type=np.ones(ROWS, int), extra=np.ones((ROWS, 2), np.float32))
  check_run(written(tmp_path, other, **settings), other, augment=augment)
  less = {name: x for name, x in examples.arrays.items() if name not in ("type", "thumb")}
  check_run(cached, dataclasses.replace(examples, arrays=less), augment=augment)
  changed = replaced(examples, mask=np.zeros((ROWS, 4, 4, 1), np.float32))
  with pytest.raises(Mismatch) as caught:
    written(tmp_path, changed, **settings)
  assert fields_of(caught) == ["data.examples.mask"]
  with pytest.raises(Mismatch, match=r"^data: .*others in 'mask' for example id"):
    check_run(cached, changed, augment=augment)
  with pytest.raises(Mismatch, match=r"^data: .*others in 'image', 'mask' for example id"):
    check_run(cached, changed.take(slice(0, 9)), augment=augment)


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
      identity.augmentation_identity(augment, source.arrays, ["image"])
  with pytest.raises(ValueError, match="augment"):
    written(tmp_path, source, augment=mixes_rows)


def test_label_maps_are_probed_as_maps():
  arrays = {"image": np.zeros((3, 4, 4, 1), np.float32), "label": np.zeros((3, 4, 4), np.uint8)}
  batch = probe_batch(arrays)
  assert batch["label"].shape == batch["image"].shape[:-1] and batch["label"].dtype == np.uint8
  assert probe_batch({"image": arrays["image"]})["label"].ndim == 1


def test_same_value_allows_rounding_of_probes():
  assert identity.same_value("augmentation.probes", [1.0, 2.0], [1.0005, 2.0])
  assert not identity.same_value("augmentation.probes", [1.0, 2.0], [1.01, 2.0])
  assert identity.same_value("teacher.probe_outputs", [1.0, 2.0], [1.02, 2.0])
  assert not identity.same_value("teacher.probe_outputs", [1.0, 2.0], [1.5, 2.0])
  assert not identity.same_value("data.crop.probes", [1.0], [1.0, 1.0])
  assert not identity.same_value("data.name", "a", "b")
