"""Numbers that torchdistill and torch gave for the same inputs, in float64 (golden.json names the versions).

Where torchdistill differs from the loss's definition the row says how.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())["values"]


def wave(shape, phase):
  i = np.arange(1, int(np.prod(shape)) + 1)
  return (2 * np.sin(1.7 * i + phase) + np.cos(0.3 * i * i + phase)).reshape(shape)


MAPS = wave((3, 4, 4, 5), 0.0), wave((3, 4, 4, 5), 1.0)
ROWS = wave((5, 6), 0.0), wave((5, 6), 1.0)
LOGITS = wave((4, 7), 0.0), wave((4, 7), 1.0)


def norm_of_kernels(**options):
  """torchdistill takes the norm where the paper takes its square: ||.|| / B^2 from ||.||^2 / B^2, B = 5."""
  return (losses.correlation_congruence(*ROWS, **options) * 25) ** 0.5 / 25


def similarity_by_l1():
  """torchdistill divides the rows of the Gram matrix by their L1 norm, where the paper says L2."""
  grams = [jnp.matmul(x, x.T) for x in (m.reshape(3, -1) for m in MAPS)]
  s, t = (g / jnp.abs(g).sum(1, keepdims=True) for g in grams)
  return ((s - t) ** 2).mean()


VALUES = {
  "kl_divergence": lambda: losses.kl_divergence(*LOGITS, temperature=3.0).mean(),
  "kl_standardized": lambda: (
    losses.kl_divergence(*map(losses.standardize, LOGITS), temperature=3.0).mean() / 9
  ),  # no T^2
  "label_smoothing": lambda: losses.hard_distillation(*LOGITS, label_smoothing=0.1).mean(),
  "dist": lambda: losses.dist(*LOGITS, beta=2.0, gamma=1.5, temperature=3.0),
  "cosine": lambda: losses.cosine(*ROWS).mean(),
  "vkd": lambda: losses.vkd(*ROWS).mean(),
  "attention_transfer": lambda: losses.attention_transfer(*MAPS).mean(),
  "attention_transfer_paper": lambda: losses.attention_transfer(*MAPS, squared=False).mean(),
  "activation_boundary": lambda: losses.activation_boundary(*MAPS).sum(),
  "factor_transfer": lambda: losses.factor_transfer(*MAPS).mean(),
  "review_kd": lambda: losses.review_kd(*MAPS).mean(),
  "inter_channel": lambda: losses.inter_channel(*MAPS).sum() / 3**2,  # over B^2, where a mean is over B
  "similarity_preserving_l1": similarity_by_l1,
  "pkt": lambda: losses.pkt(*ROWS),
  "rkd_distance": lambda: losses.rkd_distance(*ROWS),
  "rkd_angle": lambda: losses.rkd_angle(*ROWS),
  "correlation_bilinear_norm": lambda: norm_of_kernels(kernel="bilinear"),
  "correlation_gaussian_norm": lambda: norm_of_kernels(kernel="gaussian"),
}


@pytest.mark.parametrize("name", VALUES)
def test_equals_the_published_package(name):
  with jax.enable_x64(True):
    np.testing.assert_allclose(jax.jit(VALUES[name])(), GOLDEN[name], rtol=1e-6)


def test_every_golden_number_is_compared():
  assert set(VALUES) == set(GOLDEN)
