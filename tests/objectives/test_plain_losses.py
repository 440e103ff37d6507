"""Losses of arrays that need no term of their own go through `features`, `logits` and `sparse`."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses, reduce
from distill_jax.objectives import features, logits, sparse, weighted

KEY = jax.random.key(0)
WHERE = np.array([True, False, True, True])


def check(terms, expected, student, teacher, batch):
  """Compares the terms with the losses of the valid rows: one program, the other row is NaN."""
  objective = weighted(**{name: (1.0, term) for name, term in terms.items()})
  student, teacher = (
    {name: without_masked_row(x) for name, x in side.items()} for side in (student, teacher)
  )
  variables = objective.init(KEY, student, teacher)

  @jax.jit
  def both(params, student, teacher, batch):
    step = {"step": jnp.int32(0), "key": KEY}
    batch = {"where": WHERE, **batch}
    terms, _ = objective.apply(params, variables.state, student, teacher, batch, **step)
    values = {
      name: reduce.mean(*value) if isinstance(value, tuple) else value
      for name, (_, value) in terms.items()
    }
    valid = jax.tree.map(lambda x: x[WHERE], (student, teacher, batch))
    return values, expected(*valid)

  values, by_hand = jax.device_get(both(variables.params, student, teacher, batch))
  for name, value in by_hand.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
  assert set(values) == set(by_hand)


def without_masked_row(x):
  return np.where(WHERE.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan).astype(np.float32)


def test_features_take_each_loss(rng):
  student = {"map": rng.normal(size=(4, 2, 3, 5)), "flat": rng.normal(size=(4, 6))}
  teacher = {
    "map": rng.normal(size=(4, 2, 3, 5)),
    "wide": rng.normal(size=(4, 2, 3, 7)),
    "flat": rng.normal(size=(4, 6)),
  }
  terms = {
    "l1": features("map", "map", losses.l1),
    "affinity": features("map", "wide", losses.affinity, project=False),
    "ifv": features(
      "map", "wide", losses.ifv, project=False, entries={"labels": "label"}, num_classes=2
    ),
    "region_affinity": features(
      "map",
      "wide",
      losses.region_affinity,
      project=False,
      entries={"labels": "label"},
      num_classes=2,
    ),
    "importance_map": features("map", "wide", losses.importance_map, project=False),
    "pairwise_similarity": features("map", "wide", losses.pairwise_similarity, project=False),
    "kdsvd": features(("map", "map"), ("map", "map"), losses.kdsvd),
    "dark_rank": features("flat", "flat", losses.dark_rank, alpha=0.1),
    "correlation": features("flat", "flat", losses.correlation),
  }

  def expected(student, teacher, batch):
    label = batch["label"]
    maps = (student["map"],) * 2, (teacher["map"],) * 2
    widths = student["map"], teacher["wide"]
    return {
      "l1": losses.l1(student["map"], teacher["map"]).mean(),
      "affinity": losses.affinity(*widths).mean(),
      "ifv": losses.ifv(*widths, label, num_classes=2).mean(),
      "region_affinity": losses.region_affinity(*widths, label, num_classes=2).mean(),
      "importance_map": losses.importance_map(*widths).mean(),
      "pairwise_similarity": losses.pairwise_similarity(*widths).mean(),
      "kdsvd": losses.kdsvd(*maps).mean(),
      "dark_rank": losses.dark_rank(student["flat"], teacher["flat"], alpha=0.1),
      "correlation": losses.correlation(student["flat"], teacher["flat"]),
    }

  check(terms, expected, student, teacher, {"label": rng.choice([0, 1, -1], size=(4, 4, 3))})


def test_logits_and_sparse_take_each_loss(rng):
  student, teacher = (
    {"logits": rng.normal(size=(4, 3, 6)), "scores": rng.normal(size=(4, 2, 3, 3))}
    for _ in range(2)
  )
  label = rng.integers(0, 6, (4, 3)).astype(np.int32)
  label[0, 1] = -1
  pairs = rng.random((4, 1, 3, 3)) > 0.2
  terms = {
    "adaptive_kl": logits(losses.adaptive_kl, temperature=2.0),
    "minifinetuning": logits(losses.minifinetuning, threshold=0.3),
    "minillm_single_step": logits(losses.minillm_single_step, teacher_mixing=0.2),
    "sparse_jensen_shannon": sparse(losses.sparse_jensen_shannon, k=2, teacher_weight=0.3),
    "attention_cross_entropy": features(
      "scores", "scores", losses.attention_cross_entropy, project=False, entries={"mask": "pairs"}
    ),
  }

  def expected(student, teacher, batch):
    label, pairs = batch["label"], batch["pairs"]
    z = student["logits"], teacher["logits"]
    scores = student["scores"], teacher["scores"]
    labeled = label >= 0
    targets = losses.top_k(z[1], 2)
    return {
      "adaptive_kl": losses.adaptive_kl(*z, temperature=2.0).mean(),
      "minifinetuning": reduce.mean(losses.minifinetuning(*z, label, threshold=0.3), labeled),
      "minillm_single_step": reduce.mean(
        losses.minillm_single_step(*z, label, teacher_mixing=0.2), labeled
      ),
      "sparse_jensen_shannon": losses.sparse_jensen_shannon(
        z[0], targets, teacher_weight=0.3
      ).mean(),
      "attention_cross_entropy": losses.attention_cross_entropy(*scores, mask=pairs).mean(),
    }

  check(terms, expected, student, teacher, {"label": label, "pairs": pairs})
