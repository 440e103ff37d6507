"""A NaN or an infinity that does not count reaches neither value nor gradient of any term.

Terms with learned parts and memories are tested with NaN rows throughout test_learned.py.
"""

import functools

import jax
import numpy as np
import pytest

from distill_jax import losses, objectives, reduce
from distill_jax.losses import SparseTargets

KEY = jax.random.key(0)
ROWS, LENGTH, CLASSES, K = 4, 3, 6, 2
WHERE = np.array([True, True, False, True])  # of rows
COUNTED = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]], bool)  # of tokens

OF_TOKENS = (
  "kl_divergence reverse_kl soft_cross_entropy jensen_shannon skew_kl skew_reverse_kl logit_mse "
  "binary_kl total_variation hard_distillation uld cosine"
).split()
TERMS = {
  **{name: objectives.logits(getattr(losses, name), valid="counted") for name in OF_TOKENS},
  "sparse_kl": objectives.sparse(losses.sparse_kl, output="top", valid="counted"),
  "sparse_live": objectives.sparse(losses.sparse_kl, k=K, valid="counted"),
  "sampled": objectives.sparse(losses.sampled_cross_entropy, k=K, valid="counted"),
  "two_vocabularies": objectives.features(
    "logits", "wide", losses.uld, project=False, valid="counted"
  ),
  "of_labels": objectives.logits(losses.dkd, output="row"),
  "relates_rows": objectives.logits(losses.dist, output="row"),
  "entries": objectives.logits(
    lambda s, t, scale: scale * ((s - t) ** 2).sum(-1), output="row", entries={"scale": "scale"}
  ),
  "projected": objectives.features("row", "wide_row", losses.hint),
  "mutual": objectives.mutual(losses.kl_divergence, 2, output="row"),
  "tokens": objectives.tokens(label_weight=0.5),
  "tokens_stored": objectives.tokens(losses.sparse_kl, targets="top", label_weight=0.5),
  "next_tokens": objectives.next_tokens(),
  "layers": objectives.layers([(1, 1)], losses.hint, name="hidden"),
  "layers_related": objectives.layers([(1, 1)], losses.pkt, name="hidden"),
  "relations": objectives.relations([(1, 1)], relation_heads=2, names=("hidden",)),
  "attention": objectives.attention([(1, 1)]),
}


def outputs(bad):
  """Student, teacher and batch with `bad` wherever a value does not count."""
  rng = np.random.default_rng(0)

  def values(mask, *shape):
    x = rng.normal(size=(*mask.shape, *shape)).astype(np.float32)
    return np.where(mask.reshape(*mask.shape, *[1] * len(shape)), x, np.float32(bad))

  def network(width, classes):
    rows = {name: values(WHERE, CLASSES) for name in ("row", "0/row", "1/row")}
    queries = values(COUNTED, 2 * LENGTH).reshape(ROWS, LENGTH, 2, LENGTH).swapaxes(1, 2)
    return rows | {
      "logits": values(COUNTED, CLASSES),
      "wide": values(WHERE, LENGTH, classes),
      "wide_row": values(WHERE, classes),
      "hidden": values(COUNTED, width),
      "hidden1": values(COUNTED, width),
      "head": (rng.normal(size=(width, CLASSES)).astype(np.float32), None, None),
      "attention1": queries,
    }

  student, teacher = network(4, CLASSES), network(8, 9)
  student["logits"] = np.where(WHERE[:, None, None], student["logits"], np.float32(bad))
  student["top"] = student["logits"]
  log_p = jax.nn.log_softmax(values(COUNTED, CLASSES))
  indices = np.broadcast_to(np.arange(K, dtype=np.int32), (ROWS, LENGTH, K))
  tail = jax.nn.logsumexp(log_p[..., K:], -1)
  teacher["top"] = SparseTargets(indices, log_p[..., :K], tail, sampled=False)
  batch = {
    "id": np.arange(ROWS, dtype=np.int32),
    "where": WHERE,
    "counted": COUNTED,
    "scale": values(WHERE),
    "label": np.array([1, 0, 2, 3], np.int32),
  }
  return student, teacher, batch


@functools.cache
def evaluate():
  """All terms' values and gradients, in one compiled program."""
  student, teacher, _ = outputs(0.5)
  learned = {name: term.init(KEY, student, teacher) for name, term in TERMS.items()}
  token_label = np.where(COUNTED, 1, -1).astype(np.int32)

  def value(params, student, name, teacher, batch):
    if name.startswith(("tokens", "next", "layers", "relations", "attention")):
      batch = {**batch, "label": token_label}
    apply = TERMS[name].apply
    result, _ = apply(params, learned[name].state, student, teacher, batch, step=0, key=KEY)
    return reduce.mean(*result) if isinstance(result, tuple) else result

  @jax.jit
  def everything(student, teacher, batch):
    differentiate = jax.value_and_grad(value, argnums=(0, 1))
    return {
      name: differentiate(learned[name].params, student, name, teacher, batch) for name in TERMS
    }

  return everything


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_masked_values_reach_neither_value_nor_gradient(bad):
  got, expected = evaluate()(*outputs(bad)), evaluate()(*outputs(0.5))
  for name in TERMS:
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(close, got[name], expected[name])
    assert float(expected[name][0]) > 0, name
    assert any((np.asarray(g) != 0).any() for g in jax.tree.leaves(expected[name][1])), name
