"""Caches of encoder-decoders: word by word as the live teacher, and vocabularies that differ."""

import jax
import numpy as np
import optax
import pytest
import small_seq2seq
from fitting import fit_with

from distill_jax import data, losses, objectives, reduce
from distill_jax.cache import TopK, write_cache
from distill_jax.types import Variables

KEY = jax.random.key(0)
TEACHER = small_seq2seq.models(seed=1)[0]
STUDENT = small_seq2seq.models(seed=2)[0]
LIVE = objectives.tokens(losses.kl_divergence, temperature=2.0, label_weight=0.8)
CACHED = objectives.tokens(losses.sparse_kl, label_weight=0.8)


@pytest.fixture
def source(rng):
  return data.Source(
    small_seq2seq.pairs(rng, 8), small_seq2seq.VOCABULARY, ignore_label=-1, name="pairs"
  )


def write(folder, source, k):
  outputs = {"logits": TopK(k, temperature=2.0)}
  return write_cache(folder, TEACHER, source, outputs, batch_size=8, progress=False)


def test_word_level_term_from_a_cache_equals_the_live_one(source, tmp_path):
  cached = write(tmp_path, source, small_seq2seq.VOCABULARY)
  batch = cached.add_columns(dict(source.arrays) | {"id": source.ids})

  results = []
  for model, term in ((TEACHER, LIVE), (cached.model, CACHED)):

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch, model=model, term=term):
      teacher, _ = model.apply(*model.variables, batch, train=False, key=None)
      student, _ = STUDENT.apply(params, {}, batch, train=True, key=None)
      value, _ = term.apply({}, {}, student, teacher, batch, step=0, key=KEY)
      return reduce.mean(*value)

    results.append(loss(STUDENT.variables.params, batch))
  live, stored = results
  assert live[0] > 0.1
  # The cache's log-probabilities are float16.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3), live, stored)


def test_other_vocabularies_raise_before_training(source, tmp_path):
  params = dict(STUDENT.variables.params)
  params["decoder"] = params["decoder"] | {"head": np.zeros((8, 9), np.float32)}
  student = STUDENT._replace(init=lambda key, batch: Variables(params, {}), variables=None)
  cached = write(tmp_path, source, 4)
  for teacher, term, field in ((TEACHER, LIVE, "head: .*uld.*seq_kd"), (cached, CACHED, "seq_kd")):
    objective = objectives.weighted(word=(1.0, term))
    with pytest.raises(ValueError, match=f".*{field}"):
      fit_with(student, teacher, objective, optax.sgd(0.1), source, steps=1, batch_size=8)
