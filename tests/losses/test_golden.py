"""Equality with float64 values of PyTorch and published packages, in golden.json.

make_golden.py writes the file. Comments state where a package differs from the loss's definition.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import jax_losses
import numpy as np
import pytest
from loss_cases import HELPERS
from peer_cases import CASES, PUBLISHED, Inputs

from distill_jax import losses, reduce

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())
LOGITS, LABELS, ROWS, MAPS = (PUBLISHED[name] for name in ("logits", "labels", "rows", "maps"))
TOKENS, VALID = PUBLISHED["tokens"], jnp.asarray(PUBLISHED["tokens_labels"] != -100)


def cross_entropy(logits, labels):
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], -1).mean()


def similarity_by_l1():
  grams = [jnp.matmul(x, x.T) for x in (m.reshape(len(m), -1) for m in MAPS)]
  s, t = (g / jnp.abs(g).sum(1, keepdims=True) for g in grams)
  return ((s - t) ** 2).mean()


def norm(batch_mean_of_squares, size):
  """Returns the L2 norm from a mean of `size` squares."""
  return jnp.sqrt(batch_mean_of_squares * size)


def crd_twice():
  student, teacher, indices, negatives, (first, second, constants) = PUBLISHED["memory"]
  state = losses.CrdState(first, second, np.zeros_like(constants))
  for _ in range(2):
    values, state = losses.crd(student, teacher, indices, negatives, state, temperature=0.5)
  return values.mean()


def clipped_kl():
  s, t = (jnp.clip(jnp.asarray(x) / 3, 1e-7, 1) for x in LOGITS)
  return (t * jnp.log(t / s)).sum(-1).mean()


def top_k(loss):
  return loss(LOGITS[0], losses.top_k(LOGITS[1], 3))


VALUES = {
  # 0.1 cross entropy + 0.9 T^2 KL, as here; but without labels there is neither T^2 nor 0.9.
  "torchdistill_kd_with_labels": lambda: (
    0.1 * cross_entropy(LOGITS[0], LABELS)
    + 0.9 * losses.kl_divergence(*LOGITS, temperature=3.0).mean()
  ),
  "torchdistill_kd_without_labels": lambda: (
    losses.kl_divergence(*LOGITS, temperature=3.0).mean() / 9
  ),
  "torchdistill_standardized": lambda: (
    losses.kl_divergence(*map(losses.standardize, LOGITS), temperature=3.0).mean()
    / 9  # no T^2 either
  ),
  # Rows of the Gram matrix over their L1 norm, where the paper says L2.
  "torchdistill_similarity": similarity_by_l1,
  # The norm of the difference over B^2, where the paper squares it; the Gaussian kernel of raw
  # rows.
  "torchdistill_correlation": lambda: (
    norm(losses.correlation_congruence(*ROWS, kernel="bilinear"), 5**2) / 5**2
  ),
  "torchdistill_gaussian_correlation": lambda: (
    norm(losses.correlation_congruence(*ROWS), 5**2) / 5**2
  ),
  # mode="paper": the norm of the difference; ours where squared=False.
  "torchdistill_attention": lambda: losses.attention_transfer(*MAPS, squared=False).mean(),
  # For p = 2 the norm of the difference, where for p = 1 it is the mean.
  "torchdistill_factors": lambda: norm(losses.factor_transfer(*MAPS, p=2), MAPS[0][0].size).mean(),
  # The sum of the norms of the columns (one, here), where the paper takes the mean of the squares.
  "torchdistill_fsp": lambda: norm(losses.fsp(*PUBLISHED["two_layers"]), 5).mean(),
  "torchdistill_crd_twice": crd_twice,
  # The same mean over the tokens that count, without T^2; beta is the teacher's weight.
  "trl_jensen_shannon": lambda: (
    reduce.mean(losses.jensen_shannon(*TOKENS, teacher_weight=0.1, temperature=3.0), VALID) / 9
  ),
  "trl_kl": lambda: reduce.mean(losses.kl_divergence(*TOKENS), VALID),
  "trl_reverse_kl": lambda: reduce.mean(losses.reverse_kl(*TOKENS), VALID),
  # With no mask it divides by the sequences, not by the tokens.
  "trl_without_labels": lambda: losses.kl_divergence(*TOKENS).sum() / len(TOKENS[0]),
  "trl_top_k": lambda: top_k(losses.sparse_kl_conditional).mean(),
  "trl_top_k_and_tail": lambda: top_k(losses.sparse_kl).mean(),
  # Probabilities are clipped at 1e-7. By default (loss a string) Keras has neither softmax nor T^2.
  "keras_logits": lambda: losses.kl_divergence(*LOGITS, temperature=3.0).mean(),
  "keras_logits_by_default": clipped_kl,
  "keras_cosine": lambda: losses.cosine(*ROWS).mean() - 1,
  # Computed in float32. Its top k are renormalized on both sides.
  "tunix_logits": lambda: losses.kl_divergence(*LOGITS, temperature=3.0).mean(),
  "tunix_top_k": lambda: losses.sparse_kl_conditional(
    LOGITS[0], losses.top_k(LOGITS[1], 3, temperature=3.0)
  ).mean(),
}


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_equals_pytorch(case):
  with jax.enable_x64(True):
    value, _ = jax.jit(lambda args: jax_losses.value(case, args))(case.make(Inputs(real=False)))
  np.testing.assert_allclose(value, GOLDEN["values"][case.id], rtol=1e-6)


@pytest.mark.parametrize("name", VALUES)
def test_equals_published_packages_up_to_definitions(name):
  with jax.enable_x64(True):
    np.testing.assert_allclose(jax.jit(VALUES[name])(), GOLDEN["published"][name], rtol=1e-6)


def test_every_loss_and_golden_value_is_compared():
  # test_linear.py compares the first three with losses that are compared here, and
  # test_golden_repositories.py the next four with the code of their papers. The last two are
  # code of a few lines, which test_contract.py has in float64.
  elsewhere = {"linear_kl", "linear_sparse_kl", "linear_cross_entropy"}
  elsewhere |= {"cirkd", "importance_map", "pairwise_similarity", "region_affinity"}
  elsewhere |= {"margin_mse", "score_weighted"}
  compared = {case.name for case in CASES}
  assert compared == set(losses.__all__) - HELPERS - elsewhere | {"standardize"}
  assert {case.id for case in CASES} == set(GOLDEN["values"])
  assert set(VALUES) == set(GOLDEN["published"])
