import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sklearn import metrics as sk

from distill_jax import metrics, reduce
from distill_jax.types import Variables

COUNTS = jax.jit(metrics.counts, static_argnames="bins")


def predictions(rng, n=48, classes=10, never=None):
  """Logits, labels and a teacher's logits; class `never` occurs in neither labels nor predictions."""
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
  scores.update(zip(("precision", "recall", "f1"), macro[:3], strict=True))
  if classes > 5:
    scores["top5"] = sk.top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
  return scores


def assert_scores(scores, expected):
  assert scores.keys() == expected.keys()
  assert all(type(value) is float for value in scores.values())
  for name, value in expected.items():
    np.testing.assert_allclose(scores[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
@pytest.mark.parametrize("bins", [1, 15])
def test_scores_are_those_of_scikit_learn(rng, classes, bins):
  logits, labels, teacher = predictions(rng, classes=classes)
  scores = metrics.summary(COUNTS(logits, labels, teacher_logits=teacher, bins=bins))
  assert_scores(scores, reference(logits, labels, teacher, bins))
  assert ("top5" in scores) == (classes > 5)


def test_a_class_that_is_never_there_or_never_predicted_is_averaged_as_scikit_learn_does(rng):
  logits, labels, teacher = predictions(rng, n=24, never=3)
  logits[:, 7] -= 20  # labels of class 7 stay: it is never predicted
  labels[labels == 2] = 4
  logits[0, 2] += 20  # and class 2 is predicted, but never right
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    expected = reference(logits, labels, teacher)
  assert_scores(metrics.summary(COUNTS(logits, labels, teacher_logits=teacher)), expected)


def test_the_confusion_matrix_has_labels_in_rows(rng):
  logits, labels, _ = predictions(rng)
  confusion = COUNTS(logits, labels)["confusion"]
  assert jnp.issubdtype(confusion.dtype, jnp.integer)
  expected = sk.confusion_matrix(labels, logits.argmax(1), labels=range(10))
  np.testing.assert_array_equal(confusion, expected)
  assert (expected != expected.T).any()


def test_padding_counts_for_nothing_whatever_it_holds(rng):
  logits, labels, teacher = predictions(rng)
  where = np.arange(48) < 37
  expected = reference(logits[where], labels[where], teacher[where])
  logits[~where], teacher[~where] = np.nan, np.inf
  for junk in (-1, 9, 10_000):
    labels[~where] = junk
    assert_scores(metrics.summary(COUNTS(logits, labels, where, teacher_logits=teacher)), expected)


def test_examples_without_a_label_are_compared_with_the_teacher_alone(rng):
  logits, labels, teacher = predictions(rng)
  labeled = rng.random(48) > 0.5
  everything = reference(logits, labels, teacher)
  expected = reference(logits[labeled], labels[labeled], teacher[labeled])
  expected |= {name: everything[name] for name in ("agreement", "teacher_kl")}
  for missing in (-1, -100):
    masked = np.where(labeled, labels, missing)
    assert_scores(metrics.summary(COUNTS(logits, masked, teacher_logits=teacher)), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from([1, 7, 16]), min_size=1, max_size=5))
def test_batches_merge_to_the_scores_of_everything(seed, sizes):
  rng = np.random.default_rng(seed)
  logits, labels, teacher = predictions(rng, n=sum(sizes), never=1)
  ends = np.cumsum(sizes)
  parts = [
    COUNTS(logits[a:b], labels[a:b], teacher_logits=teacher[a:b])
    for a, b in zip(ends - sizes, ends, strict=True)
  ]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    expected = reference(logits, labels, teacher)
  assert_scores(metrics.summary(reduce.merge(*parts)), expected)
  assert_scores(metrics.summary(reduce.merge(*map(jax.device_get, parts))), expected)


def test_eight_devices_count_as_one_does(rng, mesh):
  logits, labels, teacher = predictions(rng)
  where = np.arange(48) % 5 > 0
  one = COUNTS(logits, labels, where, teacher_logits=teacher)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  placed = jax.device_put((logits, labels, where, teacher), sharding)
  eight = COUNTS(*placed[:3], teacher_logits=placed[3])
  np.testing.assert_array_equal(eight["confusion"], one["confusion"])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eight, one)


def test_nothing_counted_is_zero_and_not_nan(rng):
  logits, labels, teacher = predictions(rng)
  scores = metrics.summary(COUNTS(logits, labels, np.zeros(48, bool), teacher_logits=teacher))
  assert set(scores.values()) == {0.0}


def test_the_lowest_class_wins_a_tie():
  labels = np.arange(8)
  counts = metrics.counts(jnp.zeros((8, 8)), labels)
  scores = metrics.summary(counts)
  assert scores["accuracy"] == 1 / 8 and scores["top5"] == 5 / 8


def test_a_label_with_probability_zero_and_nan_logits_are_seen():
  logits = np.zeros((2, 6), np.float32)
  logits[0, 1] = -np.inf
  assert metrics.summary(metrics.counts(logits, np.array([1, 0])))["nll"] == np.inf
  logits[0] = np.nan
  scores = metrics.summary(metrics.counts(logits[:1], np.array([1])))
  assert np.isnan(scores["nll"]) and np.isnan(scores["ece"])
  assert scores["accuracy"] == scores["top5"] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_computed_in_float32(rng, dtype):
  logits, labels, teacher = (jnp.asarray(x) for x in predictions(rng, n=24))
  low, low_teacher = logits.astype(dtype), teacher.astype(dtype)
  counts = COUNTS(low, labels, teacher_logits=low_teacher)
  wide = COUNTS(low.astype(jnp.float32), labels, teacher_logits=low_teacher.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, counts, wide)


def test_a_confidence_on_an_edge_lies_in_the_lower_bin():
  diagram = metrics.reliability(metrics.counts(jnp.zeros((3, 2)), np.array([0, 0, 1]), bins=4))
  np.testing.assert_array_equal(diagram["edges"], [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_array_equal(diagram["number"], [0, 3, 0, 0])
  np.testing.assert_array_equal(diagram["confidence"], [0, 0.5, 0, 0])
  np.testing.assert_allclose(diagram["accuracy"], [0, 2 / 3, 0, 0])


def test_certainty_lies_in_the_last_bin():
  logits = np.array([[1000, 0, -1000]], np.float32)
  assert metrics.reliability(metrics.counts(logits, np.array([0])))["number"][-1] == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"logits": np.zeros((0, 3), np.float32), "labels": np.zeros(0, int)},
      r"logits must be .*got \[0, 3\]",
    ),
    ({"logits": np.zeros((4, 2, 3), np.float32)}, r"logits must be \[rows, classes\]"),
    ({"labels": np.zeros(1, int)}, r"labels must be integers \[4\].*got int64 \[1\]"),
    (
      {"labels": np.zeros((4, 3), np.float32)},
      r"labels must be integers \[4\].*got float32 \[4, 3\]",
    ),
    (
      {"teacher_logits": np.zeros((4, 5), np.float32)},
      r"teacher's logits are \[4, 5\], the student's \[4, 3\]",
    ),
    ({"teacher_logits": np.zeros((4, 1), np.float32)}, r"teacher's logits are \[4, 1\]"),
    ({"teacher_logits": np.zeros((1, 3), np.float32)}, r"teacher's logits are \[1, 3\]"),
    ({"where": np.ones(4, np.float32)}, r"where must be bool \[4\], got float32 \[4\]"),
    ({"where": np.ones(1, bool)}, r"where must be bool \[4\], got bool \[1\]"),
    ({"bins": 0}, "bins must be at least 1, got 0"),
  ],
)
def test_what_cannot_be_counted_is_refused(arguments, message):
  good = {"logits": np.zeros((4, 3), np.float32), "labels": np.zeros(4, np.int32)}
  with pytest.raises(ValueError, match=message):
    metrics.counts(**(good | arguments))


def dense(params, state, batch, *, train, key):
  assert train is False and key is None
  hidden = batch["image"].reshape(len(batch["image"]), -1) @ params["kernel"]
  return {"logits": hidden, "unused": jnp.tanh(hidden @ hidden.T @ hidden)}, state


def test_the_cost_of_a_dense_layer_is_known():
  params = {"kernel": np.ones((64, 10), np.float32)}
  state = {"mean": np.zeros(5, np.float32), "steps": np.int32(3)}
  batch = {"image": np.ones((32, 8, 8, 1), np.float32), "id": np.arange(32)}
  cost = metrics.cost(dense, Variables(params, state), batch, repeats=3)
  assert cost["parameters"] == 640 and cost["bytes"] == 640 * 4 + 5 * 4 + 4
  np.testing.assert_allclose(
    cost["flops"], 2 * 64 * 10, rtol=0.02
  )  # and nothing for the unused feature
  assert cost["latency_ms"] > 0 and cost["throughput"] > 0


def test_the_cost_does_not_depend_on_sharding_and_knows_keys(mesh):
  params = {"kernel": jnp.ones((64, 10), jnp.bfloat16)}
  state = {"key": jax.random.key(0)}
  batch = {"image": jnp.ones((16, 8, 8, 1), jnp.bfloat16)}
  placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  one = metrics.cost(dense, Variables(params, state), batch, repeats=1)
  eight = metrics.cost(dense, Variables(replicated, state), placed, repeats=1)
  for name in ("parameters", "bytes", "flops"):
    assert one[name] == eight[name]
  assert one["bytes"] == 2 * 640 + 8


def test_a_model_without_logits_is_measured_by_all_its_outputs():
  def apply(params, state, batch, *, train, key):
    return {"embedding": batch["image"] @ params}, state

  batch = {"image": np.ones((4, 16), np.float32)}
  cost = metrics.cost(apply, Variables(np.ones((16, 8), np.float32), ()), batch, repeats=1)
  np.testing.assert_allclose(cost["flops"], 2 * 16 * 8, rtol=0.02)


def test_other_batch_sizes_are_timed_with_as_many_rows(monkeypatch):
  timed = []

  def seconds(predict, variables, batch, repeats):
    timed.append(batch["image"].copy())
    return 0.5

  monkeypatch.setattr(metrics, "_seconds", seconds)
  batch = {"image": np.arange(3 * 64, dtype=np.float32).reshape(3, 64)}
  variables = Variables({"kernel": np.ones((64, 10), np.float32)}, ())
  cost = metrics.cost(dense, variables, batch, batch_sizes=(1, 8))
  assert (cost["latency_ms"], cost["throughput"], cost["throughput_1"], cost["throughput_8"]) == (
    500,
    6,
    2,
    16,
  )
  assert [len(images) for images in timed] == [1, 3, 1, 8]
  np.testing.assert_array_equal(timed[-1], np.concatenate([batch["image"]] * 3)[:8])
  assert metrics.cost(dense, variables, batch).keys() == cost.keys() - {
    "throughput_1",
    "throughput_8",
  }


def test_no_repeats_are_refused():
  with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
    metrics.cost(dense, Variables({}, {}), {}, repeats=0)
  with pytest.raises(ValueError, match=r"batch_sizes must be at least 1 each, got \[1, 0\]"):
    metrics.cost(dense, Variables({}, {}), {}, batch_sizes=(1, 0))
