"""Scores of language models, and what a report makes of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import metrics, reduce, report


@pytest.fixture
def said(rng):
  """Hidden states, a head with a bias and a soft-cap, and a teacher of another width."""
  hidden = rng.standard_normal((3, 7, 5), np.float32)
  head = (
    rng.standard_normal((5, 11), np.float32),
    rng.standard_normal(11).astype(np.float32),
    np.float32(4.0),
  )
  teacher_outputs = (
    rng.standard_normal((3, 7, 6), np.float32),
    (rng.standard_normal((6, 11), np.float32), None, None),
  )
  label = rng.integers(0, 11, (3, 7)).astype(np.int32)
  label[0, 3:5] = -1
  return hidden, head, teacher_outputs, label, np.array([True, True, False])


def logits(hidden, head):
  z = hidden.astype(np.float64) @ head[0]
  z = z if head[1] is None else z + head[1]
  return z if head[2] is None else head[2] * np.tanh(z / head[2])


@pytest.mark.parametrize("memory", [1, 5 * 4 * 11, 2**20])
def test_scores_are_those_of_the_logits(said, memory):
  hidden, head, teacher_outputs, label, where = said
  counts = jax.jit(
    lambda: metrics.token_scores(hidden, head, label, where, teacher=teacher_outputs, memory=memory)
  )()
  scores = metrics.summary(counts)
  known = (label >= 0) & where[:, None]
  own, theirs = (
    scipy.special.log_softmax(logits(*x), -1)[known] for x in ((hidden, head), teacher_outputs)
  )
  nll = -np.take_along_axis(own, label[known][:, None], -1).mean()
  assert scores["nll"] == pytest.approx(nll, rel=1e-5)
  assert scores["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
  assert scores["accuracy"] == pytest.approx((own.argmax(-1) == label[known]).mean())
  assert scores["agreement"] == pytest.approx((own.argmax(-1) == theirs.argmax(-1)).mean())
  assert scores["teacher_kl"] == pytest.approx(
    (np.exp(theirs) * (theirs - own)).sum(-1).mean(), rel=1e-4
  )
  assert np.asarray(counts["calibration"])[:, 0].sum() == known.sum()
  dense = metrics.counts(jnp.asarray(logits(hidden, head)[known], jnp.float32), label[known])
  assert scores["ece"] == pytest.approx(metrics.summary(dense)["ece"], rel=1e-4)


def test_vocabularies_that_differ_are_refused(said):
  hidden, head, teacher_outputs, label, where = said
  other = teacher_outputs[0], (teacher_outputs[1][0][:, :-1], None, None)
  with pytest.raises(ValueError, match="vocabulary has 10 tokens, the student's 11"):
    metrics.token_scores(hidden, head, label, where, teacher=other)


def entry(said, role, shift, seed=0, variant=""):
  hidden, head, teacher_outputs, label, where = said
  counts = jax.device_get(
    metrics.token_scores(hidden + shift, head, label, where, teacher=teacher_outputs)
  )
  history = [{"step": 1, "phase": "validation", "perplexity": 9.0 + shift}]
  return report.Entry(
    role,
    seed,
    None,
    {"parameters": 10},
    history,
    variant,
    counts,
    f"{role} says `this`" if seed == 0 else "",
  )


def test_a_report_of_language_models(said, tmp_path):
  entries = [
    entry(said, role, shift, seed)
    for seed in (0, 1)
    for role, shift in (("teacher", 0.5), ("baseline", 0.1 * seed), ("student", 0.2))
    if role != "teacher" or not seed
  ]
  label = said[3]
  path = report.write(
    tmp_path,
    entries,
    labels=label,
    images=None,
    ids=np.arange(3),
    class_names=list("abcdefghijk"),
    run={},
  )
  text = path.with_suffix(".md").read_text()
  assert (
    "Test perplexity ↓" in text
    and "of test perplexity" not in text
    and "in test perplexity" in text
  )
  assert (
    "Confusion" not in text and "Perplexity against size" in text and "student says `this`" in text
  )
  scores = json.loads((tmp_path / "results.json").read_text())
  gain = scores["distilled_minus_alone"]["student"]["perplexity"]["mean"]
  known = {
    (e["role"], e["seed"]): e["scores"]["perplexity"]
    for e in scores["entries"]
    if e["role"] != "teacher"
  }
  expected = np.mean([known["student", seed] - known["baseline", seed] for seed in (0, 1)])
  assert gain == pytest.approx(expected)


def test_less_perplexity_helps(said, tmp_path):
  better, worse = (entry(said, "student", 0.0, seed) for seed in (0, 1))
  counts = dict(better.counts)
  nll, number = counts["nll"]
  entries = [
    *(better._replace(role="baseline", seed=seed) for seed in (0, 1)),
    *(worse._replace(seed=seed, counts=counts | {"nll": (0.5 * nll, number)}) for seed in (0, 1)),
  ]
  path = report.write(
    tmp_path,
    entries,
    labels=said[3],
    images=None,
    ids=np.arange(3),
    class_names=list("abcdefghijk"),
    run={},
  )
  assert "distillation helped this student" in path.with_suffix(".md").read_text()


def test_counts_of_batches_add_up(said):
  hidden, head, teacher_outputs, label, where = said
  whole = metrics.token_scores(hidden, head, label)
  parts = [metrics.token_scores(hidden[i : i + 1], head, label[i : i + 1]) for i in range(3)]
  merged = reduce.merge(*parts)
  np.testing.assert_allclose(merged["nll"][0], whole["nll"][0], rtol=1e-6)
  np.testing.assert_array_equal(merged["calibration"][:, 0], whole["calibration"][:, 0])


def test_without_a_token_there_is_no_perplexity(said):
  hidden, head, _, label, _ = said
  none = np.full_like(label, -1)
  for counted in (metrics.token_scores, metrics.token_counts):
    assert np.isnan(
      metrics.summary(counted(jnp.asarray(hidden), head, jnp.asarray(none)))["perplexity"]
    )
