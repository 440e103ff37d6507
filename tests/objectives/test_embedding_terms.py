"""Terms of sentence encoders against formulas in float64: EmbedDistill, MarginMSE, listwise KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, objectives

WHERE = np.array([True, True, False, True])


def value_of(term, student, teacher, batch):
  """Returns a term's learned parts, its valid values, and the gradient for the student."""
  params, state = term.init(jax.random.key(0), student, teacher)

  def total(student):
    (values, where), _ = term.apply(params, state, student, teacher, batch, step=0, key=None)
    return jnp.where(where, values, 0).sum(), values

  gradient, values = jax.jit(jax.grad(total, has_aux=True))(student)
  return params, np.asarray(values)[WHERE], gradient


def mean_square(s, t):
  return ((s - t) ** 2).mean(-1)


def one_minus_cosine(s, t):
  return 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)


@pytest.mark.parametrize(
  ("loss", "formula"), [(losses.hint, mean_square), (losses.cosine, one_minus_cosine)]
)
def test_embeddings_are_compared_through_a_projection(rng, loss, formula):
  student, teacher = ({"embedding": rng.normal(size=(4, n)).astype(np.float32)} for n in (3, 5))
  teacher["embedding"][2] = np.nan  # padding
  term = objectives.features("embedding", "embedding", loss)
  params, values, gradient = value_of(term, student, teacher, {"where": WHERE})
  kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
  expected = formula(student["embedding"] @ kernel + bias, teacher["embedding"].astype(float))
  np.testing.assert_allclose(values, expected[WHERE], rtol=1e-5)
  assert np.isfinite(gradient["embedding"]).all() and not gradient["embedding"][2].any()


def margin_mse(s, t):
  return (((s[0] - s[1:]) - (t[0] - t[1:])) ** 2).mean()


def listwise_kl(s, t):
  log_q, log_p = (scipy.special.log_softmax(x) for x in (s, t))
  return (np.exp(log_p) * (log_p - log_q)).sum()


@pytest.mark.parametrize(
  ("loss", "formula"), [(losses.margin_mse, margin_mse), (losses.kl_divergence, listwise_kl)]
)
def test_scores_of_candidates_that_do_not_exist_count_nowhere(rng, loss, formula):
  exists = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
  student, teacher = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(2))
  expected = [
    formula(*(x[row][exists[row]].astype(float) for x in (student, teacher))) for row in range(4)
  ]
  for scores in (student, teacher):
    scores[~exists] = np.nan
    scores[2] = np.nan  # padding
  term = objectives.logits(loss, output="scores", entries={"class_mask": "exists"})
  batch = {"where": WHERE, "exists": exists}
  _, values, gradient = value_of(term, {"scores": student}, {"scores": teacher}, batch)
  np.testing.assert_allclose(values, np.array(expected)[WHERE], rtol=1e-5)
  assert not gradient["scores"][~exists].any() and not gradient["scores"][2].any()
  assert gradient["scores"][0, 0] != 0
