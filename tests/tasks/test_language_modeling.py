"""Scores of language models against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import tasks
from distill_jax.types import Task


@pytest.fixture
def outputs(rng):
  """Hidden states, a head with a bias and a soft-cap, a teacher of another width, and a batch."""
  student = {
    "hidden": rng.standard_normal((3, 7, 5), np.float32),
    "head": (
      rng.standard_normal((5, 11), np.float32),
      rng.standard_normal(11).astype(np.float32),
      np.float32(4.0),
    ),
  }
  teacher = {
    "hidden": rng.standard_normal((3, 7, 6), np.float32),
    "head": (rng.standard_normal((6, 11), np.float32), None, None),
  }
  label = rng.integers(0, 11, (3, 7)).astype(np.int32)
  label[0, 3:5] = -1
  return student, teacher, {"label": label, "where": np.array([True, True, False])}


def dense(outputs):
  kernel, bias, softcap = outputs["head"]
  z = outputs["hidden"].astype(np.float64) @ kernel
  z = z if bias is None else z + bias
  return z if softcap is None else softcap * np.tanh(z / softcap)


def scores_of(task: Task, *arguments):
  statistics = jax.device_get(jax.jit(task.statistics)(*arguments))
  return task.compute(statistics), statistics


@pytest.mark.parametrize("memory", [1, 5 * 4 * 11, 2**20])
def test_scores_equal_those_of_full_logits(outputs, memory):
  student, teacher, batch = outputs
  scores, statistics = scores_of(tasks.language_modeling(memory=memory), *(student, batch, teacher))
  valid = (batch["label"] >= 0) & batch["where"][:, None]
  log_q, log_p = (scipy.special.log_softmax(dense(x), -1)[valid] for x in (student, teacher))
  label = batch["label"][valid]
  nll = -np.take_along_axis(log_q, label[:, None], -1).mean()
  assert scores["nll"] == pytest.approx(nll, rel=1e-5)
  assert scores["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
  assert scores["accuracy"] == pytest.approx((log_q.argmax(-1) == label).mean())
  assert scores["agreement"] == pytest.approx((log_q.argmax(-1) == log_p.argmax(-1)).mean())
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
  assert scores["teacher_kl"] == pytest.approx(kl, rel=1e-4)
  assert statistics["calibration"][:, 0].sum() == valid.sum()
  rows = {"logits": jnp.asarray(dense(student)[valid], jnp.float32)}, {"label": label}, None
  expected, _ = scores_of(tasks.classification(), *rows)
  assert scores["ece"] == pytest.approx(expected["ece"], rel=1e-4)


def test_logits_and_a_head_score_the_same(outputs):
  student, teacher, batch = outputs
  task = tasks.language_modeling()
  logits = [{"logits": jnp.asarray(dense(x), jnp.float32)} for x in (student, teacher)]
  expected, _ = scores_of(task, student, batch, teacher)
  scores, _ = scores_of(task, logits[0], batch, logits[1])
  assert scores == pytest.approx(expected, rel=1e-4)


def test_other_vocabulary_of_the_teacher_is_named(outputs):
  student, teacher, batch = outputs
  other = teacher | {"head": (teacher["head"][0][:, :-1], None, None)}
  with pytest.raises(ValueError, match="teacher.*vocabulary"):
    tasks.language_modeling().statistics(student, batch, other)


def test_sums_of_batches_are_those_of_the_full_set(outputs):
  student, _, batch = outputs
  task = tasks.language_modeling()
  full = task.statistics(student, {"label": batch["label"]}, None)
  parts = [
    task.statistics(
      student | {"hidden": student["hidden"][i : i + 1]}, {"label": batch["label"][i : i + 1]}, None
    )
    for i in range(3)
  ]
  total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  np.testing.assert_allclose(total["nll"][0], full["nll"][0], rtol=1e-6)
  np.testing.assert_array_equal(total["calibration"][:, 0], full["calibration"][:, 0])


def test_without_a_token_there_is_no_perplexity(outputs):
  student, _, batch = outputs
  none = {"label": np.full_like(batch["label"], -1)}
  scores, _ = scores_of(tasks.language_modeling(), student, none, None)
  assert scores == {}
