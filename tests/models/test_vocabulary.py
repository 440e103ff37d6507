"""Heads that are wider than their tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, metrics
from distill_jax.models.llm.decoder import logits, with_vocabulary
from distill_jax.types import Model, Variables


def model_of(head):
  def apply(params, state, batch, *, train, key):
    return {"hidden": params, "head": head}, state

  return Model(lambda key, batch: Variables(jnp.zeros((1, 2, 3)), {}), apply)


@pytest.fixture
def parts(rng):
  return rng.standard_normal((1, 2, 3), np.float32), rng.standard_normal((3, 8), np.float32)


def test_tokens_that_do_not_exist_have_no_probability(parts):
  hidden, kernel = parts
  model = with_vocabulary(model_of((jnp.asarray(kernel), None, None)), 5)
  outputs, _ = model.apply(jnp.asarray(hidden), {}, {}, train=False, key=None)
  z = logits(outputs)
  assert (z[..., 5:] == -jnp.inf).all()
  expected = scipy.special.log_softmax((hidden.astype(np.float64) @ kernel)[..., :5], -1)
  np.testing.assert_allclose(jax.nn.log_softmax(z)[..., :5], expected, rtol=1e-5)
  label = np.array([[1, 4]])
  nll = -np.take_along_axis(expected, label[..., None], -1).mean()
  counts = metrics.token_scores(outputs["hidden"], outputs["head"], label)
  assert metrics.summary(counts)["nll"] == pytest.approx(nll, rel=1e-5)
  fused = metrics.summary(
    metrics.token_counts(outputs["hidden"], outputs["head"], jnp.asarray(label))
  )
  assert fused["nll"] == pytest.approx(nll, rel=1e-5)


def test_gradients_are_those_of_the_tokens_that_exist(parts):
  hidden, kernel = (jnp.asarray(x) for x in parts)
  own = with_vocabulary(model_of((kernel, None, None)), 5)

  def fused(h):
    (k, bias, _), flat = own.apply(h, {}, {}, train=True, key=None)[0]["head"], h.reshape(-1, 3)
    return losses.linear_kl(flat, k, flat[::-1], k, student_bias=bias, teacher_bias=bias)

  def plain(h):
    flat = h.reshape(-1, 3)
    return losses.kl_divergence(flat @ kernel[:, :5], flat[::-1] @ kernel[:, :5]).mean()

  with jax.default_matmul_precision("highest"):
    np.testing.assert_allclose(fused(hidden), plain(hidden), rtol=1e-5)
    value = jax.grad(lambda h: fused(h))(hidden)
  assert np.isfinite(value).all()


def test_what_cannot_be_left_out_is_said(parts):
  hidden, kernel = (jnp.asarray(x) for x in parts)
  for head, size, message in (
    ((kernel, None, None), 9, "size: expected 1 to 8, the width of the head, got 9"),
    ((kernel, None, None), 0, "size: expected 1 to 8"),
    ((kernel, None, 3.0), 5, "caps its logits"),
  ):
    with pytest.raises(ValueError, match=message):
      with_vocabulary(model_of(head), size).apply(hidden, {}, {}, train=False, key=None)
