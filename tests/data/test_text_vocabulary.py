"""Tokenizers that differ raise; padded entries of a vocabulary are not cached and do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from distill_jax import losses, objectives
from distill_jax.cache import (
  Dense,
  Mismatch,
  RandomSampling,
  TopK,
  check_run,
  open_cache,
  verify,
  write_cache,
)
from distill_jax.data import text
from distill_jax.models import from_apply
from distill_jax.train import RunOptions, fit
from distill_jax.types import Variables

SIZE, WIDTH, PADDED = 257, 4, 272
DOCUMENTS = [
  text.BYTES.encode(b"of the people"),
  text.BYTES.encode(b"by the people, for the people"),
]
EXISTS = np.arange(PADDED) < SIZE


def padded_teacher(seed=0, logits=False):
  """Returns a teacher whose padded entries are the most probable."""
  keys = jax.random.split(jax.random.key(seed), 2)
  weights = {
    "embed": jax.random.normal(keys[0], (SIZE, WIDTH)),
    "head": jax.random.normal(keys[1], (WIDTH, PADDED)),
  }
  weights["bias"] = jnp.where(EXISTS, 0.0, 9.0)

  def apply(w, tokens):
    head = w["head"], w["bias"], None
    hidden = w["embed"][tokens]
    return {"logits": hidden @ head[0] + head[1]} if logits else {"hidden": hidden, "head": head}

  return from_apply(lambda key, tokens: weights, apply, inputs="tokens")._replace(
    variables=Variables(weights, {})
  )


def other(tokenizer):
  return tokenizer._replace(identity="bytes:other")


def cache_of(folder, source, teacher=None, **codecs):
  codecs = codecs or {"logits": TopK(4)}
  teacher = teacher or padded_teacher()
  return write_cache(folder, teacher, source, codecs, batch_size=8, progress=False)


def test_cache_of_another_tokenizer_raises(tmp_path):
  source = text.pack(DOCUMENTS, length=8)
  changed = text.pack(DOCUMENTS, length=8, tokenizer=other(text.BYTES))
  assert source.vocabulary == source.take(slice(2)).vocabulary == "bytes"
  cached = cache_of(tmp_path, source)
  check_run(cached, source.take(slice(2)))
  message = r"data\.vocabulary"
  with pytest.raises(Mismatch, match=message):
    check_run(cached, changed)
  with pytest.raises(Mismatch, match=message):
    cache_of(tmp_path, changed)
  goal = objectives.weighted(soft=(1.0, objectives.tokens(losses.sparse_kl)))
  with pytest.raises(Mismatch, match=message):
    fit(
      padded_teacher(),
      cached,
      goal,
      optax.sgd(0.1),
      changed,
      steps=1,
      batch_size=8,
      run=RunOptions(progress=False),
    )
  unknown = text.pack(DOCUMENTS, length=8, tokenizer=text.BYTES._replace(identity=""))
  with pytest.raises(Mismatch, match=r"data\.vocabulary"):
    check_run(cached, unknown)


def test_different_tokenizers_raise():
  text.check_same_tokenizer(text.BYTES, text.BYTES._replace(decode=lambda tokens: ""))
  with pytest.raises(ValueError, match=r"^tokenizer:"):
    text.check_same_tokenizer(text.BYTES, other(text.BYTES))


@pytest.mark.parametrize("logits", [False, True])
def test_padded_entries_are_not_cached(tmp_path, logits):
  source, teacher = text.pack(DOCUMENTS, length=8), padded_teacher(logits=logits)
  codecs = {
    "logits@top": TopK(5, bits=16),
    "logits@sampled": RandomSampling(20),
    "logits@dense": Dense("float32"),
  }
  cached = cache_of(tmp_path, source, teacher, **codecs)
  batch = cached.add_columns({"id": source.ids})
  outputs = open_cache(tmp_path).model.apply({}, {}, batch, train=False, key=None)[0]
  w = jax.tree.map(np.float64, teacher.variables.params)
  log_p = log_softmax((w["embed"][source.arrays["tokens"]] @ w["head"])[..., :SIZE], -1)
  top = outputs["logits@top"]
  np.testing.assert_array_equal(top.indices, np.argsort(-log_p, -1)[..., :5])
  np.testing.assert_allclose(top.log_probs, -np.sort(-log_p, -1)[..., :5], atol=1e-3)
  np.testing.assert_allclose(
    top.log_tail, np.log(np.sort(np.exp(log_p), -1)[..., :-5].sum(-1)), rtol=1e-4
  )
  assert (outputs["logits@sampled"].indices < SIZE).all()
  assert (outputs["logits@dense"][..., SIZE:] == -np.inf).all()
  assert np.isfinite(outputs["logits@dense"][..., :SIZE]).all()
  if logits:
    return
  agreement = verify(cached, teacher, source, batch_size=8)
  assert agreement["logits@top"].top1 == 1 and agreement["logits@sampled"].difference == 0
  assert agreement["logits@dense"].difference < 1e-5


def value(term, student, teacher, label):
  batch = {"label": label}
  values, where = term.apply({}, {}, student, teacher, batch, step=0, key=None, axis_name=None)[0]
  return jnp.sum(jnp.where(where, values, 0)) / where.sum()


def test_class_mask_with_live_and_sparse_teachers(rng):
  teacher = padded_teacher()
  tokens = rng.integers(0, SIZE, (3, 8))
  label = rng.integers(0, SIZE, (3, 8))
  hidden = rng.normal(size=(3, 8, 6)).astype(np.float32)
  kernel = rng.normal(size=(6, PADDED)).astype(np.float32)
  w = jax.tree.map(np.float64, teacher.variables.params)
  z = np.float64(hidden) @ np.float64(kernel)
  t = w["embed"][tokens] @ w["head"] + w["bias"]
  log_q, log_p = (log_softmax(x[..., :SIZE], -1) for x in (z, t))
  masked = np.where(EXISTS, t, -np.inf).astype(np.float32)
  options = {"class_mask": jnp.asarray(EXISTS), "label_weight": 0.5}

  @jax.jit
  def run(hidden, kernel, masked):
    student = {"hidden": hidden, "head": (kernel, None, None)}
    outputs, _ = teacher.apply(*teacher.variables, {"tokens": tokens}, train=False, key=None)
    cached = {"logits": losses.top_k(masked, 5)}
    live = objectives.tokens(losses.kl_divergence, **options)
    unmasked = objectives.tokens(losses.kl_divergence, label_weight=0.5)
    conditional = objectives.tokens(losses.sparse_kl_conditional, **options)
    bucket = objectives.tokens(losses.sparse_kl, **options)

    def loss(kernel):
      return value(bucket, student | {"head": (kernel, None, None)}, cached, label)

    return (
      value(live, student, outputs, label),
      value(unmasked, student, outputs, label),
      value(conditional, student, cached, label),
      jax.grad(loss)(kernel),
    )

  live, unmasked, conditional, gradient = map(np.asarray, run(hidden, kernel, masked))
  hard = -np.take_along_axis(log_q, label[..., None], -1).mean()
  exact = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
  np.testing.assert_allclose(live, exact + 0.5 * hard, rtol=1e-5)
  assert abs(unmasked - live) > 0.1
  order = np.argsort(-log_p, -1)[..., :5]
  p, q = (softmax(np.take_along_axis(x, order, -1), -1) for x in (log_p, log_q))
  expected = (p * np.log(p / q)).sum(-1).mean() + 0.5 * hard
  np.testing.assert_allclose(conditional, expected, rtol=1e-5)
  assert (gradient[:, SIZE:] == 0).all() and np.abs(gradient[:, :SIZE]).max() > 1e-3


def test_bpe_encodes_full_documents(tmp_path):
  (tmp_path / "a.txt").write_text("some words of a document. " * 50)
  trained = text.train_bpe(tmp_path, size=300)
  trained.enable_truncation(16)
  trained.enable_padding(length=32)
  tokenizer = text.bpe(trained)
  tokens = tokenizer.encode(b"some words of a document. " * 50)
  assert len(tokens) > 100 and tokenizer.end not in tokens
  tokens = tokenizer.encode(b"a<|end|>b")
  assert tokenizer.end not in tokens and tokenizer.decode(tokens) == "a<|end|>b"
