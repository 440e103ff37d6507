"""Common misreadings of papers: each test fails for one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import losses
from logit_references import kl, kl_divergence, softmax

from distill_jax import reduce


@pytest.fixture
def logits(rng):
  return (3 * rng.normal(size=(2, 4, 6))).astype(np.float32)


def test_kl_is_not_averaged_over_the_classes(logits):
  s, t = logits
  bare_mean = np.mean(softmax(t) * np.log(softmax(t) / softmax(s)))
  np.testing.assert_allclose(reduce.mean(losses.kl_divergence(s, t)), 6 * bare_mean, rtol=1e-5)


def test_a_logit_beyond_the_temperature_still_has_a_gradient():
  s, t = jnp.array([9.0, -5.0, 2.0]), jnp.array([4.0, 8.0, -3.0])
  gradient = jax.jit(jax.grad(losses.kl_divergence))(s, t)
  clip = jax.jit(jax.grad(lambda s: (jnp.clip(t, 0, 1) * jnp.log(jnp.clip(s, 0.01, 1))).sum()))
  clipped = clip(s)
  assert (clipped == 0).all()  # The misreading has no gradient here.
  assert jnp.abs(gradient).max() > 0.9


def test_gradient_size_does_not_depend_on_the_temperature(logits):
  s, t = logits
  gradient = jax.jit(jax.grad(lambda x, T: losses.kl_divergence(x, t, temperature=T).sum()))
  sizes = [np.abs(gradient(s, T)).sum() for T in (20.0, 80.0)]
  np.testing.assert_allclose(sizes[1] / sizes[0], 1, atol=0.15)  # without T^2: 1/16


def test_padding_tokens_do_not_dilute_the_mean(logits):
  s, t = logits
  valid = np.array([True, True, False, False])
  padded = [np.where(valid[:, None], x, np.float32(0)) for x in (s, t)]
  mean = reduce.mean(losses.kl_divergence(*padded), jnp.asarray(valid))
  np.testing.assert_allclose(mean, kl_divergence(s[:2], t[:2]).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["hard_distillation", "nkd", "wsld"])
def test_hard_labels_are_at_temperature_one(logits, name):
  s, t = logits
  if name == "hard_distillation":
    value = losses.hard_distillation(s, t)
    np.testing.assert_allclose(
      value, [-np.log(softmax(a)[b.argmax()]) for a, b in zip(s, t)], rtol=1e-5
    )
    return
  labels, y = np.arange(4), np.arange(4)
  if name == "nkd":  # the target's term does not move with the temperature
    value = losses.nkd(s, t, labels, gamma=0.0, temperature=4.0)
    np.testing.assert_allclose(value, -softmax(t)[y, y] * np.log(softmax(s)[y, y]), rtol=1e-4)
  else:
    soft = losses.soft_cross_entropy(s, t, temperature=4.0)
    ratio = np.log(softmax(s)[y, y]) / (np.log(softmax(t)[y, y]) - 1e-7)
    np.testing.assert_allclose(
      losses.wsld(s, t, labels, temperature=4.0) / soft, 1 - np.exp(-ratio), rtol=1e-4
    )


def test_the_weight_of_jensen_shannon_is_the_teachers(logits):
  s, t = logits
  p, q = softmax(t), softmax(s)
  m = 0.1 * p + 0.9 * q
  expected = 0.1 * kl(p, m) + 0.9 * kl(q, m)
  np.testing.assert_allclose(losses.jensen_shannon(s, t, teacher_weight=0.1), expected, rtol=1e-4)
  assert np.abs(losses.jensen_shannon(s, t, teacher_weight=0.9) - expected).max() > 0.05


@pytest.mark.parametrize("w, limit", [(1e-4, losses.kl_divergence), (1 - 1e-4, losses.reverse_kl)])
def test_normalized_jensen_shannon_tends_to_both_kls(logits, w, limit):
  s, t = logits / 3
  with jax.enable_x64(True):
    s, t = s.astype(np.float64), t.astype(np.float64)
    value = losses.jensen_shannon(s, t, teacher_weight=w, normalize=True)
    np.testing.assert_allclose(value, limit(s, t), rtol=2e-3)


def test_conditional_kl_ignores_probability_of_other_classes(logits):
  _, t = logits
  targets = losses.top_k(t, 2)
  others = np.where(np.arange(6) == np.argmin(t, -1)[:, None], np.float32(9), np.float32(0))
  change = losses.sparse_kl_conditional(t + others, targets) - losses.sparse_kl_conditional(
    t, targets
  )
  np.testing.assert_allclose(change, 0, atol=1e-5)
  assert (losses.sparse_kl(t + others, targets) > losses.sparse_kl(t, targets) + 0.1).all()


def test_missing_vocabulary_is_minus_infinity_not_zero(logits):
  s, t = logits
  wide = [np.pad(x, ((0, 0), (0, 3)), constant_values=-np.inf) for x in (s, t)]
  zeros = [np.pad(x, ((0, 0), (0, 3))) for x in (s, t)]
  expected = losses.kl_divergence(s, t)
  np.testing.assert_allclose(losses.kl_divergence(*wide), expected, rtol=1e-5)
  mask = np.arange(9) < 6
  np.testing.assert_allclose(losses.kl_divergence(*zeros, class_mask=mask), expected, rtol=1e-5)
  assert np.abs(losses.kl_divergence(*zeros) - expected).max() > 1e-3


def test_similarity_rows_have_l2_norm_one(rng):
  s, t = rng.normal(size=(2, 5, 3)).astype(np.float32)
  l1 = [x @ x.T / np.abs(x @ x.T).sum(1, keepdims=True) for x in (s, t)]
  misread = ((l1[0] - l1[1]) ** 2).mean()
  assert losses.similarity_preserving(s, t) > 1.5 * misread


def test_attention_maps_average_the_channels(rng):
  t = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
  order = rng.permutation(4)
  np.testing.assert_allclose(losses.attention_transfer(t[..., order], t), 0, atol=1e-12)
  assert (losses.hint(t[..., order], t) > 0.1).all()


def test_standardize_has_ddof_one():
  np.testing.assert_allclose(
    losses.standardize(jnp.array([0.0, 2.0])), [-(0.5**0.5), 0.5**0.5], rtol=1e-6
  )


def test_pearson_has_ddof_one(rng):
  t = rng.normal(size=(4, 2)).astype(np.float32)
  # With ddof 1 four values have the mean square 3/4: opposite signs give (2 x)^2 / 2 on average.
  np.testing.assert_allclose(losses.pearson(-t, t), 2 * 0.75, rtol=1e-4)


def test_srd_batch_norm_has_ddof_zero():
  # Batch norm uses ddof 0 while training: +-1 stays +-1.
  s = jnp.array([[1.0], [-1.0]])
  np.testing.assert_allclose(losses.srd(s, -s), np.log(2 * 2.0**4 / (1 + 1e-4) ** 2), rtol=1e-5)
