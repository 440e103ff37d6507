"""Scores of classification against scikit-learn and formulas in float64."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sklearn import metrics as sk

from distill_jax import tasks
from distill_jax.tasks._class_figures import reliability

TASK = tasks.classification()
STATISTICS = jax.jit(TASK.statistics)


def statistics(logits, labels, where=None, teacher=None):
  batch = {"label": labels} | ({} if where is None else {"where": where})
  teacher = None if teacher is None else {"logits": teacher}
  return STATISTICS({"logits": logits}, batch, teacher)


def scores_of(*arguments, **keywords):
  return TASK.compute(jax.device_get(statistics(*arguments, **keywords)))


def predictions(rng, n=48, classes=10, never=None):
  """Logits, labels and a teacher's logits; class `never` occurs in neither labels nor
  predictions.
  """
  logits, teacher = rng.normal(size=(2, n, classes)).astype(np.float32) * 2
  labels = rng.integers(0, classes, n).astype(np.int32)
  if never is not None:
    logits[:, never] -= 20
    labels[labels == never] = 0
  return logits, labels, teacher


def reference(logits, labels, teacher, bins=15):
  """Every score in float64, from scikit-learn and from the formulas."""
  logits, teacher = logits.astype(np.float64), teacher.astype(np.float64)
  classes = logits.shape[1]
  p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (teacher, logits))
  predicted = logits.argmax(1)
  macro = sk.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
  ece = 0.0
  for b in range(bins):
    inside = (q.max(1) > b / bins) & (q.max(1) <= (b + 1) / bins)
    if inside.any():
      ece += inside.mean() * abs(q.max(1)[inside].mean() - (predicted == labels)[inside].mean())
  scores = {
    "accuracy": sk.accuracy_score(labels, predicted),
    "nll": sk.log_loss(labels, q, labels=range(classes)),
    "ece": ece,
    "agreement": (predicted == teacher.argmax(1)).mean(),
    "teacher_kl": (p * (np.log(p) - np.log(q))).sum(1).mean(),
  }
  scores.update(zip(("macro_precision", "macro_recall", "macro_f1"), macro[:3], strict=True))
  if classes > 5:
    scores["top5"] = sk.top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
  return scores


def assert_scores(scores, expected):
  assert scores.keys() == expected.keys()
  assert all(type(value) is float for value in scores.values())
  for name, value in expected.items():
    np.testing.assert_allclose(scores[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_scores_equal_scikit_learn(rng, classes):
  logits, labels, teacher = predictions(rng, classes=classes)
  scores = scores_of(logits, labels, teacher=teacher)
  assert_scores(scores, reference(logits, labels, teacher))
  assert ("top5" in scores) == (classes > 5)
  named = {metric.name for metric in TASK.metrics}
  assert scores.keys() <= named


def test_missing_classes_average_as_in_scikit_learn(rng):
  logits, labels, teacher = predictions(rng, n=24, never=3)
  logits[:, 7] -= 20  # labels of class 7 stay: it is never predicted
  labels[labels == 2] = 4
  logits[0, 2] += 20  # and class 2 is predicted, but never correct
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    expected = reference(logits, labels, teacher)
  assert_scores(scores_of(logits, labels, teacher=teacher), expected)


def test_confusion_has_labels_in_rows_and_per_class_its_sums(rng):
  logits, labels, teacher = predictions(rng)
  sums = statistics(logits, labels, teacher=teacher)
  expected = sk.confusion_matrix(labels, logits.argmax(1), labels=range(10))
  np.testing.assert_array_equal(sums["confusion"], expected)
  assert (expected != expected.T).any()
  columns = np.stack([expected.diagonal(), expected.sum(0), expected.sum(1)], -1)
  np.testing.assert_array_equal(sums["per_class"], columns)


def test_many_classes_need_no_confusion_matrix(rng, monkeypatch):
  logits, labels, teacher = predictions(rng)
  module = importlib.import_module("distill_jax.tasks.classification")
  monkeypatch.setattr(module, "MAX_CONFUSION_CLASSES", 9)
  sums = TASK.statistics({"logits": jnp.asarray(logits)}, {"label": labels}, None)
  assert "confusion" not in sums and sums["per_class"].shape == (10, 3)
  expected = reference(logits, labels, teacher)
  scores = TASK.compute(jax.device_get(sums))
  assert scores["macro_f1"] == pytest.approx(expected["macro_f1"])


def test_statistics_of_21841_classes_take_three_vectors():
  batch = {"label": jax.ShapeDtypeStruct((8,), jnp.int32)}
  outputs = {"logits": jax.ShapeDtypeStruct((8, 21_841), jnp.float32)}
  sums = jax.eval_shape(lambda o, b: TASK.statistics(o, b, None), outputs, batch)
  assert sum(x.size for x in jax.tree.leaves(sums)) < 4 * 21_841


def test_padding_counts_nowhere_whatever_it_holds(rng):
  logits, labels, teacher = predictions(rng)
  where = np.arange(48) < 37
  expected = reference(logits[where], labels[where], teacher[where])
  logits[~where], teacher[~where] = np.nan, np.inf
  for label in (-1, 9, 10, 10_000):
    labels[~where] = label
    assert_scores(scores_of(logits, labels, where, teacher), expected)


def test_unlabeled_rows_count_only_next_to_the_teacher(rng):
  logits, labels, teacher = predictions(rng)
  labeled = rng.random(48) > 0.5
  full = reference(logits, labels, teacher)
  expected = reference(logits[labeled], labels[labeled], teacher[labeled])
  expected |= {name: full[name] for name in ("agreement", "teacher_kl")}
  for missing in (-1, -100):
    masked = np.where(labeled, labels, missing)
    assert_scores(scores_of(logits, masked, teacher=teacher), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from([1, 7, 16]), min_size=1, max_size=5))
def test_sums_of_batches_are_those_of_the_full_set(seed, sizes):
  rng = np.random.default_rng(seed)
  logits, labels, teacher = predictions(rng, n=sum(sizes), never=1)
  ends = np.cumsum(sizes)
  parts = [
    statistics(logits[a:b], labels[a:b], teacher=teacher[a:b])
    for a, b in zip(ends - sizes, ends, strict=True)
  ]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    expected = reference(logits, labels, teacher)
  total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  assert_scores(TASK.compute(jax.device_get(total)), expected)


def test_eight_devices_count_as_one(rng, mesh):
  logits, labels, teacher = predictions(rng)
  where = np.arange(48) % 5 > 0
  one = statistics(logits, labels, where, teacher)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  eight = statistics(*jax.device_put((logits, labels, where, teacher), sharding))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eight, one)


def test_nothing_counted_has_no_score(rng):
  logits, labels, teacher = predictions(rng)
  assert scores_of(logits, labels, np.zeros(48, bool), teacher) == {}
  unlabeled = scores_of(logits, np.full(48, -1), teacher=teacher)
  assert unlabeled.keys() == {"agreement", "teacher_kl"}


def test_lowest_class_wins_a_tie():
  scores = scores_of(np.zeros((8, 8), np.float32), np.arange(8))
  assert scores["accuracy"] == 1 / 8 and scores["top5"] == 5 / 8


def test_probability_zero_and_nan_are_seen():
  logits = np.zeros((2, 6), np.float32)
  logits[0, 1] = -np.inf
  assert scores_of(logits, np.array([1, 0]))["nll"] == np.inf
  logits[0] = np.nan
  scores = scores_of(logits[:1], np.array([1]))
  assert np.isnan(scores["nll"]) and np.isnan(scores["ece"])
  assert scores["accuracy"] == scores["top5"] == 0


def test_bfloat16_is_computed_in_float32(rng):
  logits, labels, teacher = predictions(rng)
  low, low_teacher = (jnp.asarray(x, jnp.bfloat16) for x in (logits, teacher))
  sums = statistics(low, labels, teacher=low_teacher)
  wide = statistics(low.astype(jnp.float32), labels, teacher=low_teacher.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, sums, wide)


def test_certainty_and_edges_have_their_confidence_bins():
  sure = np.array([[1000, 0, -1000]], np.float32)
  assert reliability(statistics(sure, np.array([0])))["number"][-1] == 1
  thirds = reliability(statistics(np.zeros((3, 3), np.float32), np.array([0, 0, 1])))
  np.testing.assert_array_equal(np.flatnonzero(thirds["number"]), [4])  # (4/15, 5/15]
  assert thirds["accuracy"][4] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
  ("changed", "field"),
  [
    ({"logits": np.zeros((0, 3), np.float32), "labels": np.zeros(0, int)}, "logits"),
    ({"logits": np.zeros((4, 2, 3), np.float32)}, "logits"),
    ({"labels": np.zeros(1, int)}, "label"),
    ({"labels": np.zeros((4, 3), np.int32)}, "label"),
    ({"labels": np.zeros((4, 1), np.int32)}, "label"),
    ({"labels": np.zeros(4, np.float32)}, "label"),
    ({"teacher": np.zeros((4, 5), np.float32)}, "teacher"),
    ({"teacher": np.zeros((4, 1), np.float32)}, "teacher"),
    ({"teacher": np.zeros((1, 3), np.float32)}, "teacher"),
  ],
)
def test_what_does_not_fit_is_named(changed, field):
  good = {"logits": np.zeros((4, 3), np.float32), "labels": np.zeros(4, np.int32)}
  with pytest.raises(ValueError, match=field):
    statistics(**(good | changed))


def test_train_accuracy_counts_only_true_labels(rng):
  logits, labels, _ = predictions(rng)
  labels[:5] = -1
  where, generated = np.arange(48) > 2, np.arange(48) % 4 == 0
  batch = {"label": jnp.asarray(labels), "where": where, "generated": generated}
  total, count = TASK.train_metrics({"logits": jnp.asarray(logits)}, batch)["accuracy"]
  counted = where & ~generated & (labels >= 0)
  assert count == counted.sum() and total == (logits.argmax(1) == labels)[counted].sum()
  mixed = {"label": jnp.ones((48, 10)) / 10}
  assert TASK.train_metrics({"logits": jnp.asarray(logits)}, mixed) == {}


def test_rows_of_probabilities_are_labels(rng):
  logits, _, teacher = predictions(rng, classes=4)
  target = rng.dirichlet(np.ones(4), 48).astype(np.float32)
  target[[3, 20]] = 0  # without a label
  labeled = target.sum(1) > 0
  scores = scores_of(logits, target, teacher=teacher)
  y, z = np.float64(target[labeled]), np.float64(logits[labeled])
  q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
  assert scores["accuracy"] == pytest.approx((y.argmax(1) == z.argmax(1)).mean())
  assert scores["nll"] == pytest.approx(-(y * np.log(q)).sum(1).mean(), rel=1e-5)
  assert scores["mae"] == pytest.approx(np.abs(q - y).mean(), rel=1e-5)
  assert scores["agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).mean())
