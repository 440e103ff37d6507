"""Tagging against scikit-learn and seqeval, with padding and sub-words; bad input; the report."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from distill_jax import tasks, train
from distill_jax.models import from_apply

seq = pytest.importorskip("seqeval.metrics")

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
WORDS = ("noun", "verb", "name", "other")


def example(rng, classes, *, rows=12, length=9, absent=()):
  """Returns logits, and labels that are negative on padding and on sub-words."""
  logits = rng.normal(size=(rows, length, classes)).astype(np.float32)
  logits[..., list(absent)] = -9
  label = rng.choice([c for c in range(classes) if c not in absent], (rows, length))
  logits += 2 * np.eye(classes, dtype=np.float32)[label] * (rng.random((rows, length, 1)) < 0.7)
  is_padding = np.arange(length) >= rng.integers(3, length + 1, rows)[:, None]
  is_subword = rng.random((rows, length)) < 0.2
  return logits, np.where(is_padding | is_subword, -1, label).astype(np.int32)


def scores_of(task, logits, label, teacher=None, where=None):
  """Returns the scores of sums over two halves, and of the rows on the host."""
  batch = {"label": jnp.asarray(label)} | ({} if where is None else {"where": jnp.asarray(where)})
  outputs = {"logits": jnp.asarray(logits)}
  everything = outputs, batch, None if teacher is None else {"logits": jnp.asarray(teacher)}
  parts = np.array_split(np.arange(len(label)), min(2, len(label)))
  sums = [
    jax.jit(task.statistics)(*jax.tree.map(lambda x, rows=rows: x[rows], everything))
    for rows in parts
  ]
  scores = task.compute(jax.device_get(jax.tree.map(lambda *x: sum(x), *sums)))
  if task.evaluate_predictions is None:
    return scores
  rows = {name: np.asarray(x) for name, x in task.predict(outputs, batch).items()}
  rows = rows if where is None else {name: x[where] for name, x in rows.items()}
  return scores | task.evaluate_predictions(rows, {})


@pytest.mark.parametrize("absent", [(), (2,)])
def test_scores_of_tokens_equal_scikit_learn(rng, absent):
  logits, label = example(rng, 4, absent=absent)
  teacher = rng.normal(size=logits.shape).astype(np.float32)
  where = np.arange(12) < 10
  logits[11], label[11] = np.nan, 99  # padding of the batch may hold anything
  scores = scores_of(tasks.tagging(class_names=WORDS), logits, label, teacher, where)
  counted = (label >= 0) & where[:, None]
  y, p = label[counted], logits.argmax(-1)[counted]
  assert scores["accuracy"] == pytest.approx(sk.accuracy_score(y, p))
  assert scores["macro_f1"] == pytest.approx(sk.f1_score(y, p, average="macro"))
  by_class = sk.f1_score(y, p, average=None, labels=range(4), zero_division=0)
  expected = {f"f1/{n}": by_class[i] for i, n in enumerate(WORDS) if i not in absent}
  assert {k: x for k, x in scores.items() if "/" in k} == pytest.approx(expected)
  assert scores["agreement"] == pytest.approx((p == teacher.argmax(-1)[counted]).mean())


@pytest.mark.parametrize("absent", [(), (5, 6)])
def test_scores_of_entities_equal_seqeval(rng, absent):
  logits, label = example(rng, len(TAGS), absent=absent)
  where = np.arange(12) < 11
  task = tasks.tagging(class_names=TAGS, ignore_label=255)
  marked = np.where((label < 0) & (rng.random(label.shape) < 0.5), 255, label)
  scores = scores_of(task, logits, marked, where=where)
  sides = [
    [[TAGS[c] for c in row[counted]] for row, counted in zip(x[where], label[where] >= 0)]
    for x in (label, logits.argmax(-1))
  ]
  assert scores["f1"] == pytest.approx(seq.f1_score(*sides))
  assert scores["precision"] == pytest.approx(seq.precision_score(*sides))
  assert scores["recall"] == pytest.approx(seq.recall_score(*sides))
  by_type = seq.classification_report(*sides, output_dict=True)
  kinds = ("PER", "LOC") if absent else ("PER", "LOC", "ORG")
  expected = {f"f1/{kind}": by_type[kind]["f1-score"] for kind in kinds}
  assert {k: x for k, x in scores.items() if "/" in k} == pytest.approx(expected)
  assert [m.name for m in task.metrics][:3] == ["f1", "precision", "recall"]


def test_batches_of_several_lengths_score_like_one(rng):
  logits, label = example(rng, len(TAGS))
  label[:6, 4:] = -1
  batches = [{"x": logits[:6, :4], "label": label[:6, :4]}, {"x": logits[6:], "label": label[6:]}]
  model = from_apply(None, lambda w, x: w * x, variables=jnp.ones(()), inputs="x")
  task = tasks.tagging(class_names=TAGS)
  assert train.evaluate(model, None, batches, task) == pytest.approx(
    scores_of(task, logits, label), rel=1e-5
  )


def one_sentence(predicted, label):
  return np.eye(len(TAGS), dtype=np.float32)[None, predicted], np.int32([label])


@pytest.mark.parametrize(
  ("predicted", "label", "expected"),
  [
    ([0, 0], [0, 0], None),  # no entity on either side
    ([1, 2], [0, 0], 0.0),
    ([0, 0], [1, 2], 0.0),
    ([1, 2], [1, 2], 1.0),  # one example
    ([1, 2], [-1, -1], None),  # nothing counts
  ],
)
def test_entities_that_no_side_has(predicted, label, expected):
  scores = scores_of(tasks.tagging(class_names=TAGS), *one_sentence(predicted, label))
  assert scores.get("f1") == scores.get("f1/PER") == expected
  assert ("accuracy" in scores) == (max(label) >= 0)


def test_nan_of_a_token_that_counts_makes_scores_nan():
  task = tasks.tagging(class_names=TAGS)
  logits, label = one_sentence([1, 2, 0], [1, 2, -1])
  logits[0, 2] = np.nan
  assert scores_of(task, logits, label)["f1"] == 1
  logits[0, 1, 3] = np.nan
  assert np.isnan(scores_of(task, logits, label)["f1"])


@pytest.mark.parametrize(
  ("names", "logits", "label", "field"),
  [
    (TAGS[:-1], (2, 3, 7), (2, 3), "class_names"),
    ((), (2, 7), (2,), "'logits'"),
    ((), (2, 3, 7), (2, 4), "label"),
  ],
)
def test_shapes_that_do_not_fit_are_named(names, logits, label, field):
  task = tasks.tagging(class_names=names)
  with pytest.raises(ValueError, match=f"^{field}: "):
    task.statistics({"logits": jnp.zeros(logits)}, {"label": jnp.zeros(label, int)}, None)


def test_label_beyond_the_classes_is_named():
  task, (logits, label) = tasks.tagging(class_names=TAGS), one_sentence([1, 2], [1, 7])
  sums = jax.jit(task.statistics, static_argnums=2)({"logits": logits}, {"label": label}, None)
  with pytest.raises(ValueError, match="label"):
    task.compute(jax.device_get(sums))


@pytest.mark.parametrize("names", [("O", "B-PER", "padding"), ("noun", "noun")])
def test_names_of_classes_are_checked(names):
  with pytest.raises(ValueError, match="class_names"):
    tasks.tagging(class_names=names)


def test_entities_without_seqeval_name_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
  with pytest.raises(ModuleNotFoundError, match="seqeval.*tagging"):
    scores_of(tasks.tagging(class_names=TAGS), *one_sentence([1, 2], [1, 2]))
