"""Embeddings against scipy, scikit-learn and all pairs of rows; undefined scores; bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from distill_jax import tasks, train
from distill_jax.models import from_apply
from distill_jax.tasks import _neighbors


def cosines(x, y=None):
  x, y = (np.asarray(z, np.float64) for z in (x, x if y is None else y))
  return (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)


def measured(task, student, batch, teacher=None):
  """Returns what `evaluate` measures of networks that return entries of the batch, in batches of 7
  of which the last one is padded.
  """
  x = np.asarray(student, np.float32)
  batch = {"x": x, **batch} | ({} if teacher is None else {"y": np.asarray(teacher, np.float32)})
  batches = []
  for start in range(0, len(x), 7):
    rows = np.arange(start, start + 7)
    filled = {name: values[np.minimum(rows, len(x) - 1)] for name, values in batch.items()}
    batches.append(filled | {"where": rows < len(x)})
  network, other = (
    from_apply(None, lambda w, x: {"embedding": w * x}, variables=jnp.ones(()), inputs=name)
    for name in ("x", "y")
  )
  return train.evaluate(network, None, batches, task, teacher=None if teacher is None else other)


def test_correlations_of_pairs_equal_scipy(rng):
  x = rng.normal(size=(20, 4))
  pair = np.int32([0, 1, 2, -1, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 4, -1, 3, 2, 1, 0])
  score = rng.integers(0, 6, 9)[np.maximum(pair, 0)].astype(np.float32)
  score[3] = 99  # in no pair
  scores = measured(tasks.embedding(pair="pair"), x, {"pair": pair, "score": score})
  rows = np.array([np.flatnonzero(pair == number) for number in range(9)])
  similarity = cosines(x)[rows[:, 0], rows[:, 1]]
  assert scores["spearman"] == pytest.approx(stats.spearmanr(similarity, score[rows[:, 0]])[0])
  expected = stats.pearsonr(similarity, score[rows[:, 0]])[0]
  assert scores["pearson"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("with_queries", [False, True])
def test_retrieval_equals_scikit_learn(rng, k, with_queries, monkeypatch):
  monkeypatch.setattr(_neighbors, "_CHUNK", 8)
  x = rng.normal(size=(23, 5))
  group = rng.integers(-1, 6, 23).astype(np.int32)
  batch = {"group": group, "query": np.arange(23) % 3 == 0}
  task = tasks.embedding(group="group", query="query" if with_queries else None, k=k)
  scores = measured(task, x, batch)
  ndcg, recall = [], []
  for row in np.flatnonzero(batch["query"]) if with_queries else range(23):
    documents = np.flatnonzero(~batch["query"]) if with_queries else np.delete(np.arange(23), row)
    relevant = (group[documents] == group[row]) & (group[row] >= 0)
    if relevant.any():
      similarity = cosines(x)[row, documents]
      ndcg.append(sk.ndcg_score([relevant], [similarity], k=k))
      recall.append(relevant[np.argsort(-similarity)[:k]].sum() / relevant.sum())
  assert scores["ndcg"] == pytest.approx(np.mean(ndcg))
  assert scores["recall"] == pytest.approx(np.mean(recall))


@pytest.mark.parametrize("max_pairs", [1000, 150])
def test_teacher_of_another_width_is_compared(rng, max_pairs, monkeypatch):
  monkeypatch.setattr(_neighbors, "MAX_PAIRS", max_pairs)
  x, teacher = rng.normal(size=(30, 4)), rng.normal(size=(30, 6))
  x[:, :2] += 3 * teacher[:, :2]
  scores = measured(tasks.embedding(k=5), x, {}, teacher)
  student_similarity, teacher_similarity = cosines(x), cosines(teacher)
  pairs = np.triu_indices(30, 1)
  expected = stats.spearmanr(student_similarity[pairs], teacher_similarity[pairs])[0]
  tolerance = 1e-6 if max_pairs > 435 else 0.15  # a random part of the pairs
  assert scores["teacher_spearman"] == pytest.approx(expected, abs=tolerance)
  similarities = student_similarity, teacher_similarity
  nearest = [np.argsort(9 * np.eye(30) - x, axis=1)[:, :5] for x in similarities]
  common = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*nearest)])
  assert scores["neighbors"] == pytest.approx(common)


def everything(rows, **changes):
  """Returns a task with all scores, and a batch for it."""
  batch = {
    "pair": np.arange(rows, dtype=np.int32) // 2,
    "score": (np.arange(rows) // 2).astype(np.float32),
    "group": np.arange(rows, dtype=np.int32) // 3,
  }
  return tasks.embedding(pair="pair", group="group"), batch | changes


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan])
def test_equal_embeddings_and_nan_have_scores_of_nan(rng, value):
  task, batch = everything(6)
  x = np.full((6, 4), value) * (1 + np.arange(6)[:, None])  # of one direction
  if np.isnan(value):
    x[1:] = rng.normal(size=(5, 4))
  outputs = {"embedding": jnp.asarray(x, jnp.float32)}
  teacher = {"teacher/embedding": rng.normal(size=(6, 3))}
  scores = task.evaluate_predictions(task.predict(outputs, batch | teacher), batch)
  assert set(scores) == {metric.name for metric in task.metrics}
  assert np.isnan(list(scores.values())).all()


def test_scores_that_do_not_exist_are_left_out(rng):
  task, batch = everything(6, score=np.ones(6, np.float32), group=np.full(6, -1, np.int32))
  x = rng.normal(size=(6, 4)).astype(np.float32)
  assert task.evaluate_predictions({"embedding": x}, batch) == {}
  one = {"embedding": x[:1], "teacher": x[:1]}
  _, batch = everything(1, pair=np.int32([-1]))
  assert task.evaluate_predictions(one, batch) == {}


@pytest.mark.parametrize(
  ("changes", "field"),
  [
    ({"pair": np.int32([0, 0, 1, 1, 1, 2])}, "pair"),
    ({"score": np.float32([0, 0, 1, 2, 3, 3])}, "score"),
    ({"group": np.zeros(6, np.float32)}, "group"),
    ({"pair": np.zeros((6, 1), np.int32)}, "pair"),
  ],
)
def test_entries_that_do_not_fit_are_named(rng, changes, field):
  task, batch = everything(6, **changes)
  with pytest.raises(ValueError, match=f"{field}: "):
    measured(task, rng.normal(size=(6, 4)), batch)


def test_arguments_and_embeddings_are_checked():
  with pytest.raises(ValueError, match="^query"):
    tasks.embedding(query="query")
  with pytest.raises(ValueError, match="^'embedding'"):
    tasks.embedding().statistics({"embedding": jnp.zeros((2, 3, 4))}, {}, None)
