"""Multi-label and regression against scikit-learn; terms, inference and metrics
of one's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from distill_jax import losses, objectives, reduce, tasks
from distill_jax.tasks.objective_terms import OUTPUT, evaluate_terms
from distill_jax.types import Metric, Variables


def total_of(task, outputs, batch, teacher=None, parts=3):
  """Returns the added sums of the batch cut in parts, as an evaluation adds them."""

  def cut(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)

  rows = np.array_split(np.arange(len(batch["label"])), parts)
  sums = [
    task.statistics(cut(outputs, r), cut(batch, r), None if teacher is None else cut(teacher, r))
    for r in rows
  ]
  return jax.device_get(jax.tree.map(lambda *leaves: sum(leaves), *sums))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, bool])
def test_multi_label_equals_scikit_learn(rng, dtype):
  task = tasks.multi_label()
  logits = rng.normal(size=(30, 5)).astype(np.float32)
  labels = rng.random((30, 5)) < 0.4
  labels[:, 3], logits[:, 3] = False, -1.0  # class 3 neither occurs nor is predicted
  where = np.arange(30) < 26
  outputs, batch = {"logits": logits}, {"label": labels.astype(dtype), "where": where}
  padded = outputs | {"logits": np.where(where[:, None], logits, np.nan)}
  scores = task.compute(total_of(task, jax.tree.map(jnp.asarray, padded), batch))
  y, z = labels[where], logits[where].astype(np.float64)
  assert scores["macro_f1"] == pytest.approx(
    sk.f1_score(y, z > 0, average="macro", zero_division=0)
  )
  assert scores["micro_f1"] == pytest.approx(sk.f1_score(y, z > 0, average="micro"))
  assert scores["exact"] == pytest.approx(sk.accuracy_score(y, z > 0))
  nll = -(y * -np.log1p(np.exp(-z)) + ~y * -np.log1p(np.exp(z))).mean()
  assert scores["nll"] == pytest.approx(nll, rel=1e-5)
  predictions = jax.tree.map(lambda x: np.asarray(x)[where], task.predict(outputs, batch))
  host = task.evaluate_predictions(predictions, {"label": batch["label"][where]})
  occurs = y.any(0)
  expected = sk.average_precision_score(y[:, occurs], z[:, occurs], average="macro")
  assert host["map"] == pytest.approx(expected)


@pytest.mark.parametrize("missing", [np.int32(-1), np.int32(255), np.float32(255)])
def test_unlabeled_rows_of_multi_label_do_not_count(rng, missing):
  task = tasks.multi_label(ignore_label=255)
  logits = rng.normal(size=(12, 3)).astype(np.float32)
  labels = (rng.random((12, 3)) < 0.5).astype(missing.dtype)
  labeled = np.arange(12) % 3 > 0
  marked = np.where(labeled[:, None], labels, missing)
  marked[3] = labels[3]
  marked[3, 1] = missing  # one of a row's labels
  sums = [
    task.statistics({"logits": jnp.asarray(z)}, {"label": jnp.asarray(y)}, None)
    for z, y in ((logits, marked), (logits[labeled], labels[labeled]))
  ]
  assert task.compute(sums[0]) == pytest.approx(task.compute(sums[1]))
  host = task.evaluate_predictions({"logits": logits}, {"label": marked})
  assert host == task.evaluate_predictions({"logits": logits[labeled]}, {"label": labels[labeled]})


@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_regression_equals_scikit_learn(rng, shape):
  task = tasks.regression(unit="mm")
  labels = rng.normal(150, 70, shape).astype(np.float32)
  prediction = labels + rng.normal(3, 20, shape).astype(np.float32)
  where = np.arange(40) < 37
  labels[1], labels[38] = np.nan, np.inf
  batch = {"label": jnp.asarray(labels), "where": where}
  scores = task.compute(total_of(task, {"logits": jnp.asarray(prediction)}, batch))
  counted = where & (np.arange(40) != 1)
  y, p = labels[counted].ravel(), prediction[counted].ravel()
  assert scores["rmse"] == pytest.approx(np.sqrt(sk.mean_squared_error(y, p)), rel=1e-5)
  assert scores["mae"] == pytest.approx(sk.mean_absolute_error(y, p), rel=1e-5)
  assert scores["r2"] == pytest.approx(sk.r2_score(y, p), rel=1e-4)
  assert task.metrics[0] == Metric("rmse", "root mean squared error", "mm", "min", ".4g")


def regression_scores(task, prediction, **batch):
  """Returns the scores of both kinds: of sums, and of the rows on the host."""
  outputs, where = {"logits": jnp.asarray(prediction)}, batch.get("where")
  batch = {name: jnp.asarray(x) for name, x in batch.items()}
  rows = jax.device_get(task.predict(outputs, batch))
  rows = rows if where is None else {name: x[where] for name, x in rows.items()}
  sums = jax.device_get(task.statistics(outputs, batch, None))
  return task.compute(sums) | task.evaluate_predictions(rows, {})


@pytest.mark.parametrize("column", [False, True])
def test_correlations_of_regression_equal_scipy(rng, column):
  label = rng.integers(0, 5, 40).astype(np.float32)  # with ties
  prediction = label + rng.normal(0, 2, 40).astype(np.float32)
  where = np.arange(40) < 37
  counted = where & (np.arange(40) != 3)
  label[3], label[38] = -999, np.inf
  y, p = label[counted], prediction[counted]
  prediction[3], prediction[38] = np.nan, np.nan
  if column:
    prediction = prediction[:, None]
  task = tasks.regression(ignore_label=-999)
  scores = regression_scores(task, prediction, label=label, where=where)
  assert scores["pearson"] == pytest.approx(stats.pearsonr(p, y).statistic)
  assert scores["spearman"] == pytest.approx(stats.spearmanr(p, y).statistic)


@pytest.mark.parametrize(
  ("prediction", "label", "expected"),
  [
    ([0.1, 0.1, 0.1], [1, 2, 3], np.nan),  # A network that has learned nothing yet.
    ([0.1, np.nan, 0.1], [1, 2, 3], np.nan),
    ([0.1, 0.2, 0.4], [2, 2, 2], None),
    ([0.1], [2], None),
    ([0.1, 0.2], [-1, -1], None),
    ([[0.1, 0.2], [0.3, 0.4]], [[1, 2], [3, 4]], None),  # several numbers per example
  ],
)
def test_correlation_that_is_undefined(prediction, label, expected):
  scores = regression_scores(
    tasks.regression(ignore_label=-1), np.float32(prediction), label=np.float32(label)
  )
  for name in ("pearson", "spearman"):
    assert (name in scores) == (expected is not None)
    assert np.isnan(scores.get(name, np.nan))


def test_regression_takes_a_column_and_names_other_shapes():
  task = tasks.regression()
  label = jnp.arange(4.0)
  column = task.statistics({"logits": label[:, None] + 1}, {"label": label}, None)
  assert task.compute(jax.device_get(column))["rmse"] == pytest.approx(1.0)
  with pytest.raises(ValueError, match="label"):
    task.statistics({"logits": jnp.zeros((4, 4))}, {"label": label}, None)


def test_objective_terms_are_weighted_means_over_the_full_set(rng):
  objective = objectives.weighted(
    hard=(0.25, objectives.labels()),
    soft=(lambda step: 0.1 * step, objectives.logits(losses.kl_divergence)),
  )
  student, teacher = (jnp.asarray(rng.normal(size=(10, 4)), jnp.float32) for _ in range(2))
  label = jnp.asarray(rng.integers(0, 4, 10))
  where = np.arange(10) < 7
  task = tasks.objective_terms(["hard", "soft"])
  learned = Variables({"hard": {}, "soft": {}}, {"hard": {}, "soft": {}})

  def sums(rows):
    outputs, given = {"logits": student[rows]}, {"logits": teacher[rows]}
    batch = {"label": label[rows], "where": where[rows]}
    context = dict(step=jnp.int32(3), key=jax.random.key(0))
    terms = evaluate_terms(objective, learned, outputs, given, batch, **context)
    return task.statistics({OUTPUT: terms}, batch, None)

  parts = [sums(slice(0, 6)), sums(slice(6, 10))]
  scores = task.compute(jax.device_get(jax.tree.map(jnp.add, *parts)))
  log_q = jax.nn.log_softmax(student)[:7]
  hard = -np.take_along_axis(np.asarray(log_q), np.asarray(label)[:7, None], -1).mean()
  soft = np.asarray(losses.kl_divergence(student[:7], teacher[:7])).mean()
  assert scores["hard"] == pytest.approx(hard, rel=1e-5)
  assert scores["soft"] == pytest.approx(soft, rel=1e-5)
  assert scores["loss"] == pytest.approx(0.25 * hard + 0.3 * soft, rel=1e-5)
  assert [m.name for m in task.metrics] == ["loss", "hard", "soft", "teacher_kl", "agreement"]


SHAPES = jax.ShapeDtypeStruct
INT, FLOAT = jnp.int32, jnp.float32


@pytest.mark.parametrize(
  ("outputs", "label", "first"),
  [
    ({"logits": SHAPES((4, 3), FLOAT)}, SHAPES((4,), INT), "accuracy"),
    ({"logits": SHAPES((4, 7, 3), FLOAT)}, SHAPES((4, 7), INT), "perplexity"),
    ({"logits": SHAPES((4, 7, 7, 3), FLOAT)}, SHAPES((4, 7, 7), INT), "miou"),
    ({"logits": SHAPES((4, 5, 7, 7, 3), FLOAT)}, SHAPES((4, 5, 7, 7), INT), "miou"),
    ({"logits": SHAPES((4, 3, 3, 3), FLOAT)}, SHAPES((4, 7, 7), INT), "miou"),
    ({"logits": SHAPES((4, 7, 7, 3), FLOAT)}, SHAPES((4, 7, 7), FLOAT), None),
    ({"logits": SHAPES((4, 7, 7, 1), FLOAT)}, SHAPES((4, 7, 7), INT), None),
    (
      {"hidden": SHAPES((4, 7, 5), FLOAT), "head": (SHAPES((5, 9), FLOAT),)},
      SHAPES((4, 7), INT),
      "perplexity",
    ),
    ({"logits": SHAPES((4, 3), FLOAT)}, SHAPES((4, 3), INT), None),
    ({"logits": SHAPES((4, 3), FLOAT)}, SHAPES((4, 1), INT), None),
    ({"logits": SHAPES((4, 4), FLOAT)}, SHAPES((4, 4), INT), None),
    ({"logits": SHAPES((4, 1), FLOAT)}, SHAPES((4,), FLOAT), None),
    ({"logits": SHAPES((4, 1), FLOAT)}, SHAPES((4,), INT), None),
    ({"embedding": SHAPES((4, 3), FLOAT)}, SHAPES((4,), INT), None),
    ({"logits": SHAPES((4, 3), FLOAT)}, None, None),
  ],
)  # fmt: skip
def test_a_task_is_inferred_only_where_it_is_safe(outputs, label, first):
  batch = {} if label is None else {"label": label}
  task = tasks.infer(outputs, batch)
  assert (task and task.metrics[0].name) == first


def test_with_metric_adds_a_mean_and_keeps_the_rest(rng):
  def hits(outputs, batch, teacher):
    top3 = jnp.argsort(outputs["logits"], -1)[:, -3:]
    return reduce.total((top3 == batch["label"][:, None]).any(-1), batch.get("where"))

  metric = Metric("top3", "top-3 accuracy", "%", format=".2%")
  task = tasks.classification().with_metric(metric, hits)
  logits = jnp.asarray(rng.normal(size=(20, 6)), jnp.float32)
  batch = {"label": jnp.asarray(rng.integers(0, 6, 20)), "where": np.arange(20) < 15}
  scores = task.compute(total_of(task, {"logits": logits}, batch))
  expected = sk.top_k_accuracy_score(
    batch["label"][:15], np.asarray(logits)[:15], k=3, labels=range(6)
  )
  assert scores["top3"] == pytest.approx(expected)
  assert scores["accuracy"] <= scores["top3"] and task.metrics[-1] == metric
  with pytest.raises(ValueError, match="metric.*top3"):
    task.with_metric(metric, hits)


@pytest.mark.parametrize("value", [jnp.ones(()), (jnp.ones(2), jnp.ones(2)), jnp.ones(2)])
def test_metric_that_is_no_sum_and_count_is_named(value):
  task = tasks.classification().with_metric(Metric("mine", "mine"), lambda *_: value)
  with pytest.raises(ValueError, match="^metric 'mine': "):
    task.statistics({"logits": jnp.ones((2, 3))}, {"label": np.zeros(2, int)}, None)
