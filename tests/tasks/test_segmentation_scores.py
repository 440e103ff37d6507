"""Segmentation against scikit-learn: classes, their means, ignored pixels, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from distill_jax import data, losses, tasks, train
from distill_jax.models import from_apply
from distill_jax.tasks.segmentation import counts_of

NAMES = ("rock", "land", "water", "lake")


def sums_of(task, logits, label, teacher=None, **batch):
  """Returns the added sums of the two halves of a batch."""
  half = len(label) // 2
  outputs = [{"logits": jnp.asarray(logits[rows])} for rows in (slice(half), slice(half, None))]
  others = [None, None]
  if teacher is not None:
    others = [{"logits": jnp.asarray(teacher[r])} for r in (slice(half), slice(half, None))]
  batch = {"label": label, **batch}
  sums = [
    task.statistics(one, {name: jnp.asarray(x[rows]) for name, x in batch.items()}, other)
    for one, other, rows in zip(outputs, others, (slice(half), slice(half, None)))
  ]
  return jax.device_get(jax.tree.map(jnp.add, *sums))


def example(rng, *, grid=(4, 5), classes=4, absent=(), ignored=None, rows=6):
  """Returns logits and labels; the absent classes neither occur nor are predicted."""
  shape = rows, *grid
  logits = rng.normal(size=(*shape, classes)).astype(np.float32)
  logits[..., list(absent)] = -9
  label = rng.choice([c for c in range(classes) if c not in absent], shape).astype(np.int32)
  if ignored is not None:
    label[:, 0] = ignored
  return logits, label


@pytest.mark.parametrize(
  ("ignored", "grid", "absent", "include_background"),
  [
    (None, (4, 5), (), True),
    (255, (4, 5), (2,), True),
    (-1, (4, 5), (0, 3), False),
    (255, (4, 5), (1, 2, 3), False),
    (255, (2, 2, 5), (3,), False),
  ],
)
def test_scores_equal_scikit_learn(rng, ignored, grid, absent, include_background):
  task = tasks.segmentation(
    ignore_label=ignored, class_names=NAMES, include_background=include_background
  )
  logits, label = example(rng, grid=grid, absent=absent, ignored=ignored)
  where = np.arange(6) < 5
  teacher = rng.normal(size=logits.shape).astype(np.float32)
  scores = task.compute(sums_of(task, logits, label, teacher, where=where))
  predicted = logits.argmax(-1)
  counted = (label != ignored) & where.reshape(-1, *[1] * len(grid))
  y, p = label[counted], predicted[counted]
  occurs = sorted({*y.tolist(), *p.tolist()})
  names = [NAMES[number] for number in occurs]
  for name, score in (("iou", sk.jaccard_score), ("dice", sk.f1_score)):
    by_class = dict(zip(names, score(y, p, labels=occurs, average=None)))
    measured = {key[len(name) + 1 :]: x for key, x in scores.items() if key.startswith(f"{name}/")}
    assert measured == pytest.approx(by_class)
    parts = [x for key, x in by_class.items() if include_background or key != NAMES[0]]
    mean = scores.get("miou" if name == "iou" else "dice")
    assert mean == (pytest.approx(np.mean(parts)) if parts else None)
  assert scores["pixel_accuracy"] == pytest.approx(sk.accuracy_score(y, p))
  assert scores["agreement"] == pytest.approx((predicted == teacher.argmax(-1))[where].mean())


def test_confusion_matrix_equals_scikit_learn(rng):
  logits, label = example(rng, ignored=255)
  label[2] = 255  # a mask without a label
  sums = sums_of(tasks.segmentation(ignore_label=255), logits, label)
  counted = label != 255
  expected = sk.confusion_matrix(label[counted], logits.argmax(-1)[counted], labels=range(4))
  np.testing.assert_array_equal(counts_of(sums), expected)


def test_class_that_is_only_predicted_has_0(rng):
  logits, label = example(rng, classes=3, absent=(2,))
  logits[0, 0, 0] = [0, 0, 9]
  scores = tasks.segmentation().compute(sums_of(tasks.segmentation(), logits, label))
  assert scores["iou/2"] == scores["dice/2"] == 0
  assert scores["miou"] == pytest.approx((scores["iou/0"] + scores["iou/1"]) / 3)


def test_masks_without_a_label_have_no_score(rng):
  task = tasks.segmentation(ignore_label=255)
  logits, label = example(rng)
  assert task.compute(sums_of(task, logits, np.full_like(label, 255))) == {}


def test_only_background_has_no_mean_without_it(rng):
  task = tasks.segmentation(include_background=False)
  logits, label = example(rng, classes=2, absent=(1,))
  scores = task.compute(sums_of(task, logits, label))
  assert scores == {"pixel_accuracy": 1.0, "iou/0": 1.0, "dice/0": 1.0}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_masks_of_eight_bits_are_counted_as_int32(rng, dtype):
  task = tasks.segmentation()
  logits, label = example(rng, grid=(8, 8), classes=21)
  narrow, wide = (sums_of(task, logits, label.astype(d))["confusion"] for d in (dtype, np.int32))
  np.testing.assert_array_equal(narrow, wide)


def test_more_pixels_than_32_bits_hold_are_counted():
  task = tasks.segmentation()
  logits = np.zeros((2, 50, 100, 2), np.float32)
  label = np.zeros((2, 50, 100), np.int32)
  label[0] = 1
  sums = sums_of(task, logits, label)
  many = jax.tree.map(lambda x: x * np.int32(500_000), sums)
  np.testing.assert_array_equal(counts_of(many), [[25 * 10**8, 0], [25 * 10**8, 0]])
  assert task.compute(many) == task.compute(sums)


def test_nan_logits_are_no_class(rng):
  task = tasks.segmentation(ignore_label=255)
  logits, label = example(rng, ignored=255)
  logits[0, 0, :, 1] = np.nan  # pixels that do not count
  assert np.isfinite(task.compute(sums_of(task, logits, label))["miou"])
  logits[1, 1, 1, 2] = np.nan
  scores = task.compute(sums_of(task, logits, label))
  assert np.isnan([scores[name] for name in ("miou", "dice", "pixel_accuracy", "iou/0")]).all()


def test_names_of_classes_choose_weights_and_are_checked():
  task = tasks.segmentation(class_names=NAMES)
  names = [metric.name for metric in task.metrics]
  assert names[:3] == ["miou", "dice", "pixel_accuracy"] and "dice/lake" in names
  assert {m.detail for m in task.metrics if "/" in m.name} == {3}
  logits, label = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2), int)
  with pytest.raises(ValueError, match="^class_names: .*3.*4"):
    task.statistics({"logits": logits}, {"label": label}, None)
  with pytest.raises(ValueError, match="^class_names: .*'a'"):
    tasks.segmentation(class_names=["a", "b", "a"])


def evaluated(label, task=None, *, image=None, **entries):
  """Returns the scores of a network whose logits are the image's channels."""
  model = from_apply(None, lambda w, image: image * w, variables=jnp.ones(()))
  image = np.zeros((*label.shape[:3], 3), np.float32) if image is None else image
  batches = [{"image": image, "label": label, **entries}]
  return train.evaluate(model, None, batches, task or tasks.segmentation())


@pytest.mark.parametrize(
  ("label", "error"),
  [
    (np.zeros((2, 4, 4), np.float32), r"label: .*int32"),
    (np.zeros((2, 4, 4, 1), np.int32), r"label.*\[\.\.\., 0\]"),
    (np.full((2, 4, 4), 7), r"label: .*7 for example id 30"),
    (np.full((2, 4, 4), 255, np.uint8), r"label: .*255 for example id 30.*ignore_label=255"),
    (np.zeros((2, 4), np.int32), "label"),
  ],
)
def test_label_maps_that_do_not_fit_are_named(label, error):
  image = np.zeros((2, 4, 4, 3), np.float32)
  with pytest.raises(ValueError, match=error):
    evaluated(label, image=image, id=np.array([30, 31]))


def test_float_maps_as_wide_as_the_classes_are_no_probabilities():
  with pytest.raises(ValueError, match="label: .*int32"):
    evaluated(np.full((2, 4, 3), 2, np.float32))


def test_images_without_labels_are_no_fault(rng):
  logits, label = example(rng, classes=3)
  label[4] = -1
  scores = evaluated(label, image=logits)
  y, p = label[label >= 0], logits.argmax(-1)[label >= 0]
  assert scores["miou"] == pytest.approx(sk.jaccard_score(y, p, average="macro"))
  with pytest.raises(ValueError, match="label"):
    evaluated(np.full_like(label, data.UNLABELED), image=logits)


def test_examples_have_an_iou_each(rng):
  task = tasks.segmentation(ignore_label=255, include_background=False)
  logits, label = example(rng, ignored=255)
  label[2] = 255
  iou = task.predict({"logits": jnp.asarray(logits)}, {"label": jnp.asarray(label)})["iou"]
  for row, value in enumerate(np.asarray(iou)):
    counted = label[row] != 255
    y, p = label[row][counted], logits[row].argmax(-1)[counted]
    occurs = sorted({*y.tolist(), *p.tolist()} - {0})
    expected = sk.jaccard_score(y, p, labels=occurs, average="macro") if occurs else np.nan
    assert value == pytest.approx(expected, nan_ok=True)


def test_logits_on_another_grid_are_resized_to_the_labels(rng):
  task = tasks.segmentation()
  _, label = example(rng, grid=(8, 8))
  logits, teacher = (rng.normal(size=(6, n, n, 4)).astype(np.float32) for n in (4, 2))
  sums = sums_of(task, logits, label, teacher)
  resized = [np.asarray(losses.resize_logits(x, (8, 8))) for x in (logits, teacher)]
  expected = sums_of(task, resized[0], label, resized[1])
  assert task.compute(sums) == pytest.approx(task.compute(expected))
  with pytest.raises(ValueError, match="student's logits"):
    task.statistics({"logits": jnp.zeros((6, 4, 9, 4))}, {"label": jnp.asarray(label)}, None)


def test_one_logit_is_that_of_class_1(rng):
  """Of a student and a teacher on other grids; the KL is that of two Bernoulli distributions."""
  task = tasks.segmentation(class_names=["land", "water"])
  label = rng.integers(0, 2, (6, 8, 8))
  student, teacher = (rng.normal(size=(6, n, n, 1)).astype(np.float32) for n in (8, 4))
  scores = task.compute(sums_of(task, student, label, teacher))
  q, p = (np.asarray(losses.resize_logits(x, (8, 8)))[..., 0] for x in (student, teacher))
  assert scores["iou/water"] == pytest.approx(sk.jaccard_score(label.ravel(), q.ravel() > 0))
  assert scores["agreement"] == pytest.approx(((p > 0) == (q > 0)).mean())
  kl = float(losses.binary_kl(q[..., None], p[..., None]).mean())
  assert scores["teacher_kl"] == pytest.approx(kl, rel=1e-4)
  outputs = {"logits": jax.ShapeDtypeStruct(student.shape, jnp.float32)}
  assert task.label_classes(outputs) == {"label": 2}


@pytest.mark.parametrize("x64", [False, True])
def test_strict_promotion_is_no_fault(rng, x64):
  logits, label = example(rng, classes=3)
  batch = {"label": label.astype(np.uint8), "where": np.arange(6) < 5}
  task = tasks.segmentation(cases=tasks.Cases())
  with (
    jax.enable_x64(x64),
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    outputs = {"logits": jax.ShapeDtypeStruct(logits.shape, jnp.float32)}
    shapes = jax.eval_shape(task.statistics, outputs, batch, outputs)
    jax.eval_shape(task.predict, outputs, batch)
  assert shapes["confusion"].dtype == jnp.int32
