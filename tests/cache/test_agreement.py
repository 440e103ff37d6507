"""Checks that `verify` finds a teacher whose outputs differ from a cache."""

import numpy as np
import pytest
from scipy.special import softmax
from toys import AUGMENT, ROWS, linear, written

from distill_jax.cache import Dense, RandomSampling, TopK, verify
from distill_jax.cache.teacher import agreement


def test_verify_finds_another_teacher(tmp_path, source):
  outputs = {"logits": Dense("float16"), "hidden": Dense("float32")}
  cached = written(tmp_path, source, outputs=outputs, augment=AUGMENT, num_views=2)
  same = verify(cached, linear(), source, 50, augment=AUGMENT, batch_size=16)
  assert same["logits"].rows == 50 and 0 < same["logits"].difference < 0.01
  assert same["logits"].kl < 1e-5 and same["logits"].top1 == 1
  assert same["hidden"].difference < 1e-6 and same["hidden"].kl is None
  other = verify(cached, linear(scale=1.1), source, 50, augment=AUGMENT, batch_size=16)
  assert other["logits"].difference > 0.1 and other["logits"].kl > 1e-4
  unaugmented = verify(cached, linear(), source, 50, batch_size=16)
  assert unaugmented["hidden"].difference > 0.1


def bucket_kl(source, teacher, other):
  """Returns the mean KL of the 3 most probable classes and the rest at temperature 2."""
  rows = source.arrays["image"].reshape(ROWS, -1).astype(np.float64)
  p, q = (softmax(rows @ np.float64(x.variables.params) / 2, -1) for x in (teacher, other))
  order = np.argsort(-p, -1)
  p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
  p, q = (np.concatenate([x[:, :3], x[:, 3:].sum(-1, keepdims=True)], -1) for x in (p, q))
  return (p * np.log(p / q)).sum(-1).mean()


def test_verify_compares_top_k_and_random_samples(tmp_path, source):
  outputs = {"logits@top": TopK(3, 2.0, bits=16), "logits@samples": RandomSampling(4)}
  cached = written(tmp_path, source, outputs=outputs)
  same = verify(cached, linear(), source, batch_size=16)
  assert same["logits@top"].rows == ROWS and same["logits@top"].difference < 0.05
  assert same["logits@top"].kl < 1e-3 and same["logits@top"].top1 == 1
  assert same["logits@samples"].difference == 0 and same["logits@samples"].kl is None
  other = verify(cached, linear(1), source, batch_size=16)
  assert other["logits@top"].top1 < 0.8
  assert other["logits@top"].kl == pytest.approx(bucket_kl(source, linear(), linear(1)), rel=1e-3)
  assert other["logits@samples"].difference > 0.2


def test_rows_are_sampled_by_seed(augmented, source):
  def rows(seed, n=8):
    ids, views = agreement._random_rows(augmented, source, n, seed)
    return list(zip(ids.tolist(), views.tolist()))

  assert rows(0) == rows(0) != rows(1)
  assert len(set(rows(0))) == 8 and {view for _, view in rows(0)} == {0, 1}
  assert len(set(rows(0, n=1000))) == 2 * ROWS
