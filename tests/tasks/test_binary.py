"""`tasks.binary` against scikit-learn, with padding, ignored rows and probabilities as labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from distill_jax import tasks

TASK = tasks.binary(ignore_label=255)


def scores_of(task, logits, label, teacher=None, **entries):
  """Returns the scores of a batch in two parts, with those of the host, as an evaluation does."""
  batch = {"label": label, **entries}
  parts, rows = [], []
  for part in (slice(0, 9), slice(9, None)):
    piece = {name: jnp.asarray(x[part]) for name, x in batch.items()}
    given = None if teacher is None else {"logits": jnp.asarray(teacher[part])}
    outputs = {"logits": jnp.asarray(logits[part])}
    parts.append(task.statistics(outputs, piece, given))
    where = np.asarray(piece.get("where", np.ones(len(piece["label"]), bool)))
    rows.append({name: np.asarray(x)[where] for name, x in task.predict(outputs, piece).items()})
  sums = jax.device_get(jax.tree.map(lambda a, b: a + b, *parts))
  predictions = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
  return task.compute(sums) | task.evaluate_predictions(predictions, {})


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_scores_equal_scikit_learn(rng, dtype, column):
  logits, teacher = rng.normal(size=(2, 40)).astype(np.float32)
  label = (rng.random(40) < 0.3).astype(dtype)
  where = np.arange(40) < 36
  counted = where.copy()
  if dtype != np.float32:
    label[[2, 11]] = 255
    counted[[2, 11]] = False
  y, z = label[counted].astype(int), logits[counted].astype(np.float64)
  p = 1 / (1 + np.exp(-z))
  logits[~where], label[~where] = np.nan, 7
  shape = (40, 1) if column else (40,)
  arrays = (x.reshape(shape) for x in (logits, label, teacher))
  scores = scores_of(TASK, *arrays, where=where)
  q = 1 / (1 + np.exp(-teacher[where].astype(np.float64)))
  s = 1 / (1 + np.exp(-logits[where].astype(np.float64)))
  kl = q * np.log(q / s) + (1 - q) * np.log((1 - q) / (1 - s))
  expected = {
    "auroc": sk.roc_auc_score(y, z),
    "average_precision": sk.average_precision_score(y, z),
    "f1": sk.f1_score(y, z > 0),
    "balanced_accuracy": sk.balanced_accuracy_score(y, z > 0),
    "accuracy": sk.accuracy_score(y, z > 0),
    "brier": sk.brier_score_loss(y, p),
    "nll": sk.log_loss(y, p),
    "mae": np.abs(p - y).mean(),
    "agreement": ((q > 0.5) == (s > 0.5)).mean(),
    "teacher_kl": kl.mean(),
  }
  assert scores == pytest.approx(expected, rel=1e-5)
  assert {m.name for m in TASK.metrics} == set(expected)


def test_probabilities_as_labels_are_compared_as_such(rng):
  logits, label = rng.normal(size=20).astype(np.float32), rng.random(20).astype(np.float32)
  scores = scores_of(tasks.binary(), logits, label)
  p, y = 1 / (1 + np.exp(-np.float64(logits))), np.float64(label)
  assert scores["mae"] == pytest.approx(np.abs(p - y).mean(), rel=1e-5)
  assert scores["brier"] == pytest.approx(((p - y) ** 2).mean(), rel=1e-5)
  nll = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
  assert scores["nll"] == pytest.approx(nll, rel=1e-5)
  assert scores["auroc"] == pytest.approx(sk.roc_auc_score(y >= 0.5, p))


def test_scores_that_do_not_exist_are_left_out(rng):
  logits = rng.normal(size=12).astype(np.float32)
  one_class = scores_of(TASK, logits, np.zeros(12, np.int32))
  assert not {"auroc", "average_precision"} & set(one_class)
  assert one_class["balanced_accuracy"] == pytest.approx((logits <= 0).mean())
  assert one_class["f1"] == 0
  assert scores_of(TASK, logits, np.full(12, 255)) == {}
  unlabeled = scores_of(TASK, logits, np.full(12, -1), teacher=logits)
  assert unlabeled == pytest.approx({"agreement": 1, "teacher_kl": 0}, abs=1e-6)


@pytest.mark.parametrize(
  ("logits", "label", "field"),
  [
    (np.zeros((12, 2)), np.zeros(12, int), "logits"),
    (np.zeros(12), np.zeros((12, 3), int), "label"),
    (np.zeros(12), np.full(12, 2), "label"),
    (np.zeros(12), np.full(12, 1.5, np.float32), "label"),
  ],
)
def test_outputs_and_labels_that_do_not_fit_raise(logits, label, field):
  with pytest.raises(ValueError, match=field):
    scores_of(TASK, logits, label)
