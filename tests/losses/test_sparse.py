"""Sparse targets: K of a teacher's V classes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import losses
from logit_references import softmax


@pytest.fixture
def logits(rng):
  return (2 * rng.normal(size=(2, 3, 6))).astype(np.float32)


def test_top_k_has_the_normalizer_of_the_full_vocabulary(logits):
  targets = losses.top_k(logits[1], 2, temperature=2.0)
  p = softmax(logits[1], 2)
  np.testing.assert_allclose(np.exp(targets.log_probs), np.sort(p)[:, :-3:-1], rtol=1e-5)
  np.testing.assert_allclose(np.exp(targets.log_tail), np.sort(p)[:, :-2].sum(1), rtol=1e-5)
  np.testing.assert_array_equal(losses.top_k(logits[1], 6).log_tail, -np.inf)


def test_bucketed_kl_is_at_most_the_full_one_and_equal_at_k_v(logits):
  s, t = logits

  @jax.jit
  def by_k(s, t):
    return [losses.sparse_kl(s, losses.top_k(t, k, temperature=2.0)) for k in range(1, 7)]

  full = losses.kl_divergence(s, t, temperature=2.0)
  before = np.zeros(3)
  for value in jax.device_get(by_k(s, t)):
    assert (value >= before - 1e-6).all() and (value <= full + 1e-5).all()
    before = value
  np.testing.assert_allclose(before, full, rtol=1e-5)


def test_gradient_of_the_bucket_off_the_support(logits):
  s, t = logits
  targets = losses.top_k(t, 2)
  q, r = softmax(s), np.exp(targets.log_tail)
  off = np.ones((3, 6), bool)
  np.put_along_axis(off, np.asarray(targets.indices), False, -1)
  expected = np.where(off, q * (1 - r / (q * off).sum(1))[:, None], q - softmax(t))
  gradient = jax.jit(jax.grad(lambda s: losses.sparse_kl(s, targets).sum()))(s)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_sampling_is_unbiased_for_the_gradient_of_cross_entropy(logits):
  s, t = logits[:, 0, :3]
  p = softmax(t)
  pairs = np.array(list(itertools.product(range(3), repeat=2)))

  @jax.jit
  def gradients(s):
    def of_pair(indices):
      targets = losses.SparseTargets(indices, jnp.log(jnp.full(2, 0.5)), jnp.array(-jnp.inf))
      return jax.grad(losses.sampled_cross_entropy)(s, targets)

    return jax.vmap(of_pair)(pairs), jax.grad(losses.soft_cross_entropy)(s, t)

  by_pair, expected = gradients(s)
  mean = p[pairs].prod(1) @ by_pair  # Every outcome of two samples, by its probability.
  np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_samples_come_from_the_teacher_at_its_temperature():
  z = jnp.array([[2.0, 0.0, -jnp.inf]])
  targets = jax.device_get(losses.sample_k(jax.random.key(0), z, 20_000, temperature=2.0))
  assert targets.indices.shape == (1, 20_000) and targets.temperature == 2.0
  np.testing.assert_allclose((targets.indices == 0).mean(), jax.nn.sigmoid(1.0), atol=0.02)
  assert (targets.indices < 2).all()
  np.testing.assert_allclose(np.exp(targets.log_probs).sum(-1), 1, rtol=1e-4)


DETERMINISTIC = "sparse_kl", "sparse_kl_conditional", "sparse_kl_smoothed"


def test_indices_outside_the_vocabulary_are_nan(logits):
  @jax.jit
  def values(indices):
    targets = losses.SparseTargets(indices, jnp.full((3, 1), -0.1), jnp.full(3, -2.0))
    names = (*DETERMINISTIC, "sampled_cross_entropy")
    return {name: getattr(losses, name)(logits[0], targets) for name in names}

  for invalid in (-1, 6):
    for name, value in values(np.full((3, 1), invalid)).items():
      assert np.isnan(value).all(), name


def test_padded_vocabulary_of_the_student(logits):
  s, t = logits
  targets = losses.top_k(t, 2)
  wide = np.pad(s, ((0, 0), (0, 2)), constant_values=7)
  for f in (getattr(losses, name) for name in DETERMINISTIC):
    masked = f(wide, targets, class_mask=np.arange(8) < 6)
    np.testing.assert_allclose(masked, f(s, targets), rtol=1e-5)
    infinite = np.where(wide == 7, -np.inf, wide)
    np.testing.assert_allclose(f(infinite, targets), f(s, targets), rtol=1e-5)


def test_tail_without_other_classes_is_infinite(logits):
  targets = losses.SparseTargets(jnp.array([0, 1]), jnp.log(jnp.array([0.5, 0.3])), jnp.log(0.2))
  assert losses.sparse_kl(jnp.zeros(2), targets) == jnp.inf
  assert losses.sparse_kl_smoothed(jnp.zeros(2), targets) == jnp.inf


def test_temperature_is_a_static_field_of_targets(logits):
  s, t = logits
  targets = losses.top_k(t, 6, temperature=3.0)
  value = jax.jit(losses.sparse_kl)(s, targets)
  np.testing.assert_allclose(value, losses.kl_divergence(s, t, temperature=3.0), rtol=1e-5)


def test_invalid_arguments_raise(logits):
  s, t = logits
  for k in (0, 7):
    with pytest.raises(ValueError, match="^k:"):
      losses.top_k(t, k)
  with pytest.raises(ValueError, match="^k:"):
    losses.sample_k(jax.random.key(0), t, 0)
  with pytest.raises(ValueError, match="^temperature"):
    losses.top_k(t, 2, temperature=0)
  with pytest.raises(ValueError, match="^temperature.*static"):
    jax.jit(lambda T: losses.top_k(t, 2, temperature=T))(2.0)
  with pytest.raises(ValueError, match="^targets"):
    losses.sparse_kl(s[:2], losses.top_k(t, 2))
  with pytest.raises(ValueError, match="^targets"):
    losses.sparse_kl(s[:, :3], losses.top_k(t, 4))
  floats = losses.SparseTargets(np.ones((3, 1)), np.zeros((3, 1)), np.zeros(3))
  with pytest.raises(ValueError, match="^indices"):
    losses.sparse_kl(s, floats)


def test_random_samples_and_top_k_have_different_losses(logits):
  s, t = logits
  for name in DETERMINISTIC:
    with pytest.raises(ValueError, match="^targets"):
      getattr(losses, name)(s, losses.sample_k(jax.random.key(0), t, 2))
  with pytest.raises(ValueError, match="^targets"):
    losses.sampled_cross_entropy(s, losses.top_k(t, 2))
