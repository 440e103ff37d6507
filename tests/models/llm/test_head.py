"""Tests heads that are wider than their tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, tasks
from distill_jax.models.llm.head import head_logits, with_logits, with_vocab_size
from distill_jax.types import Model, Variables


def model_of(head):
  def apply(params, state, batch, *, train, key):
    return {"hidden": params, "head": head}, state

  return Model(lambda key, batch: Variables(jnp.zeros((1, 2, 3)), {}), apply)


@pytest.fixture
def parts(rng):
  return rng.standard_normal((1, 2, 3), np.float32), rng.standard_normal((3, 8), np.float32)


def test_tokens_from_vocab_size_on_have_probability_0(parts):
  hidden, kernel = parts
  model = with_vocab_size(model_of((jnp.asarray(kernel), None, None)), 5)
  outputs, _ = model.apply(jnp.asarray(hidden), {}, {}, train=False, key=None)
  z = head_logits(outputs)
  assert (z[..., 5:] == -jnp.inf).all()
  expected = scipy.special.log_softmax((hidden.astype(np.float64) @ kernel)[..., :5], -1)
  np.testing.assert_allclose(jax.nn.log_softmax(z)[..., :5], expected, rtol=1e-5)
  label = np.array([[1, 4]])
  nll = -np.take_along_axis(expected, label[..., None], -1).mean()
  task = tasks.language_modeling()
  sums = jax.device_get(task.statistics(outputs, {"label": jnp.asarray(label)}, None))
  assert task.compute(sums)["nll"] == pytest.approx(nll, rel=1e-5)
  fused = losses.linear_cross_entropy(outputs["hidden"][0], outputs["head"], label[0])
  assert fused == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("bias", [None, 2.0])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_logits_are_biased_then_capped(parts, bias, softcap):
  hidden, kernel = parts
  biases = None if bias is None else jnp.full(8, bias)
  model = with_logits(model_of((jnp.asarray(kernel), biases, softcap)))
  outputs, _ = model.apply(jnp.asarray(hidden), {}, {}, train=False, key=None)
  z = hidden.astype(np.float64) @ kernel + (bias or 0)
  expected = z if softcap is None else softcap * np.tanh(z / softcap)
  assert set(outputs) == {"logits"}
  np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_the_remaining_tokens(parts):
  hidden, kernel = (jnp.asarray(x) for x in parts)
  model = with_vocab_size(model_of((kernel, None, None)), 5)

  def fused(h):
    head = model.apply(h, {}, {}, train=True, key=None)[0]["head"]
    flat = h.reshape(-1, 3)
    return losses.linear_kl(flat, head, flat[::-1], head)

  def plain(h):
    flat = h.reshape(-1, 3)
    teacher = jax.lax.stop_gradient(flat[::-1])
    return losses.kl_divergence(flat @ kernel[:, :5], teacher @ kernel[:, :5]).mean()

  with jax.default_matmul_precision("highest"):
    value, gradient = jax.jit(jax.value_and_grad(fused))(hidden)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(hidden)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "softcap, size, field",
  [(None, 9, "vocab_size"), (None, 0, "vocab_size"), (3.0, 5, "softcap")],
)
def test_invalid_vocab_size_raises(parts, softcap, size, field):
  hidden, kernel = parts
  model = with_vocab_size(model_of((kernel, None, softcap)), size)
  with pytest.raises(ValueError, match=rf"^{field}"):
    model.apply(hidden, {}, {}, train=False, key=None)
