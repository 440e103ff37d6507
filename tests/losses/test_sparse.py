"""Teachers kept as K of V classes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses


@pytest.fixture
def logits(rng):
  return (2 * rng.normal(size=(2, 3, 6))).astype(np.float32)


def test_top_k_keeps_the_normalizer_of_the_whole_vocabulary(logits):
  targets = losses.top_k(logits[1], 2, temperature=2.0)
  p = jax.nn.softmax(logits[1] / 2)
  np.testing.assert_allclose(jnp.exp(targets.log_probs), np.sort(p)[:, :-3:-1], rtol=1e-5)
  np.testing.assert_allclose(jnp.exp(targets.log_tail), np.sort(p)[:, :-2].sum(1), rtol=1e-5)
  np.testing.assert_array_equal(losses.top_k(logits[1], 6).log_tail, -np.inf)


def test_bucketed_kl_is_below_the_full_one_and_meets_it_at_k_equal_v(logits):
  s, t = logits
  full = losses.kl_divergence(s, t, temperature=2.0)
  before = np.zeros(3)
  for k in range(1, 7):
    value = losses.sparse_kl(s, losses.top_k(t, k, temperature=2.0))
    assert (value >= before - 1e-6).all() and (value <= full + 1e-5).all()
    before = value
  np.testing.assert_allclose(before, full, rtol=1e-5)


def test_gradient_of_the_bucket_off_the_support(logits):
  s, t = logits
  targets = losses.top_k(t, 2)
  q, r = jax.nn.softmax(s), jnp.exp(targets.log_tail)
  off = np.ones((3, 6), bool)
  np.put_along_axis(off, np.asarray(targets.indices), False, -1)
  expected = np.where(off, q * (1 - r / (q * off).sum(1))[:, None], q - jax.nn.softmax(t))
  np.testing.assert_allclose(
    jax.grad(lambda s: losses.sparse_kl(s, targets).sum())(s), expected, atol=1e-5
  )


def test_sampling_is_unbiased_for_the_gradient_of_cross_entropy(logits):
  s, t = logits[:, 0, :3]
  p = jax.nn.softmax(t)
  mean = jnp.zeros(3)
  for draws in itertools.product(
    range(3), repeat=2
  ):  # every outcome of two draws, by its probability
    targets = losses.SparseTargets(jnp.array(draws), jnp.log(jnp.full(2, 0.5)), jnp.array(-jnp.inf))
    mean += p[draws[0]] * p[draws[1]] * jax.grad(losses.sampled_cross_entropy)(s, targets)
  np.testing.assert_allclose(mean, jax.grad(losses.soft_cross_entropy)(s, t), atol=1e-6)


def test_samples_come_from_the_teacher_at_its_temperature():
  z = jnp.array([[2.0, 0.0, -jnp.inf]])
  targets = losses.sample_k(jax.random.key(0), z, 20_000, temperature=2.0)
  assert targets.indices.shape == (1, 20_000) and targets.temperature == 2.0
  np.testing.assert_allclose((targets.indices == 0).mean(), jax.nn.sigmoid(1.0), atol=0.02)
  assert (targets.indices < 2).all()
  np.testing.assert_allclose(jnp.exp(targets.log_probs).sum(-1), 1, rtol=1e-4)


def test_indices_outside_the_vocabulary_are_nan_not_dropped(logits):
  for bad in (-1, 6):
    targets = losses.SparseTargets(jnp.full((3, 1), bad), jnp.full((3, 1), -0.1), jnp.full(3, -2.0))
    for f in (losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed):
      assert jnp.isnan(f(logits[0], targets)).all(), f.__name__
    assert jnp.isnan(losses.sampled_cross_entropy(logits[0], targets)).all()


def test_padded_vocabulary_of_the_student(logits):
  s, t = logits
  targets = losses.top_k(t, 2)
  wide = np.pad(s, ((0, 0), (0, 2)), constant_values=7)
  for f in (losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed):
    masked = f(wide, targets, class_mask=np.arange(8) < 6)
    np.testing.assert_allclose(masked, f(s, targets), rtol=1e-5)
    infinite = np.where(wide == 7, -np.inf, wide)
    np.testing.assert_allclose(f(infinite, targets), f(s, targets), rtol=1e-5)


def test_a_tail_with_no_class_to_carry_it_is_infinite(logits):
  targets = losses.SparseTargets(jnp.array([0, 1]), jnp.log(jnp.array([0.5, 0.3])), jnp.log(0.2))
  assert losses.sparse_kl(jnp.zeros(2), targets) == jnp.inf
  assert losses.sparse_kl_smoothed(jnp.zeros(2), targets) == jnp.inf


def test_the_temperature_is_static_and_travels_with_the_targets(logits):
  s, t = logits
  targets = losses.top_k(t, 6, temperature=3.0)
  value = jax.jit(losses.sparse_kl)(s, targets)
  np.testing.assert_allclose(value, losses.kl_divergence(s, t, temperature=3.0), rtol=1e-5)


def test_misuse_is_refused(logits):
  s, t = logits
  for k in (0, 7):
    with pytest.raises(ValueError, match="k must be"):
      losses.top_k(t, k)
  with pytest.raises(ValueError, match="k must be at least 1"):
    losses.sample_k(jax.random.key(0), t, 0)
  with pytest.raises(ValueError, match="temperature"):
    losses.top_k(t, 2, temperature=0)
  with pytest.raises(ValueError, match="static"):
    jax.jit(lambda T: losses.top_k(t, 2, temperature=T))(2.0)
  with pytest.raises(ValueError, match=r"student \(2, 6\) does not fit log_probs \(3, 2\)"):
    losses.sparse_kl(s[:2], losses.top_k(t, 2))
  with pytest.raises(ValueError, match="more than the student's"):
    losses.sparse_kl(s[:, :3], losses.top_k(t, 4))
  floats = losses.SparseTargets(jnp.ones((3, 1)), jnp.zeros((3, 1)), jnp.zeros(3))
  with pytest.raises(ValueError, match="indices must be integers"):
    losses.sparse_kl(s, floats)
