"""Losses of attention, sequences, boxes and pixels as terms: they take entries of the batch."""

import functools

import jax
import numpy as np
import pytest
import scipy.special

from distill_jax import losses, reduce
from distill_jax.objectives import features, logits

KEY = jax.random.key(0)
ROWS = np.array([1, 1, 0, 1], bool)


def normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def evaluate(term, student, teacher, batch):
  """Returns values and their mean over a batch of 4 rows, of which one is not valid."""
  params, state = term.init(KEY, student, teacher)
  apply = jax.jit(functools.partial(term.apply, step=0, key=KEY))
  value, _ = apply(params, state, student, teacher, {"where": ROWS} | batch)
  return np.asarray(value[0]), float(reduce.mean(*value))


def log_softmax(z):
  return scipy.special.log_softmax(np.float64(z), -1)


def kl(s, t):
  return (np.exp(log_softmax(t)) * (log_softmax(t) - log_softmax(s))).sum(-1)


def tokens(rng):
  return np.arange(5) < rng.integers(2, 6, (4, 1))


def test_attention_kl_takes_its_mask_from_the_batch(rng):
  s, t, exists = normal(rng, 4, 2, 5, 5), normal(rng, 4, 2, 5, 5), tokens(rng)
  pairs = (exists[:, :, None] & exists[:, None])[:, None]
  term = features("a3", "a7", losses.attention_kl, entries={"mask": "pairs"})
  _, mean = evaluate(term, {"a3": s}, {"a7": t}, {"pairs": pairs})
  each = []
  for i in np.flatnonzero(ROWS):
    n = exists[i].sum()
    each.append(kl(s[i, :, :n, :n], t[i, :, :n, :n]).mean())
  np.testing.assert_allclose(mean, np.mean(each), rtol=1e-4)


def test_attention_scores_take_their_mask_from_the_batch(rng):
  s, t, exists = normal(rng, 4, 2, 5, 5), normal(rng, 4, 2, 5, 5), tokens(rng)
  term = features("a3", "a7", losses.attention_scores_mse, entries={"mask": "keys"})
  _, mean = evaluate(term, {"a3": s}, {"a7": t}, {"keys": exists[:, None, None]})
  each = [((s[i] - t[i]) ** 2)[..., exists[i]].mean() for i in np.flatnonzero(ROWS)]
  np.testing.assert_allclose(mean, np.mean(each), rtol=1e-4)


def test_minilm_relations_take_three_outputs_of_other_widths(rng):
  student = {name: normal(rng, 4, 5, 6) for name in ("q", "k", "v")}
  teacher = {name: normal(rng, 4, 5, 10) for name in ("q", "k", "v")}
  exists = tokens(rng)
  term = features(
    ("q", "k", "v"),
    ("q", "k", "v"),
    losses.minilm_relations,
    project=False,
    relation_heads=2,
    entries={"mask": "tokens"},
  )
  _, mean = evaluate(term, student, teacher, {"tokens": exists})

  def relations(x, row):
    heads = np.split(np.float64(x[row, exists[row]]), 2, -1)
    return np.stack([a @ a.T / np.sqrt(a.shape[-1]) for a in heads])

  each = [
    sum(kl(relations(student[a], i), relations(teacher[a], i)).mean() for a in "qkv")
    for i in np.flatnonzero(ROWS)
  ]
  np.testing.assert_allclose(mean, np.mean(each), rtol=1e-4)


def test_a_transducer_takes_its_labels_and_its_lattice(rng):
  s, t = normal(rng, 4, 3, 3, 5), normal(rng, 4, 3, 3, 5)
  targets = rng.integers(1, 5, (4, 2)).astype(np.int32)
  lattice = rng.random((4, 3, 3)) > 0.3
  term = logits(losses.rnnt_three_way, entries={"labels": "targets"}, valid="lattice")
  # The utterance's class label is not the loss's.
  batch = {"targets": targets, "lattice": lattice, "label": np.zeros(4, np.int32)}
  values, mean = evaluate(term, {"logits": s}, {"logits": t}, batch)
  assert values.shape == (4, 3, 3)

  def three(z, u, label):
    p = np.exp(log_softmax(z))
    parts = [p[0]] if u == 2 else [p[0], p[label]]
    return np.array([*parts, 1 - sum(parts)])

  each = []
  for b, i, u in np.argwhere(lattice & ROWS[:, None, None]):
    p, q = (three(z[b, i, u], u, targets[b, min(u, 1)]) for z in (t, s))
    each.append((p * np.log(p / q)).sum())
  np.testing.assert_allclose(mean, np.mean(each), rtol=1e-3)


def test_boxes_that_exist_count(rng):
  s, t, exist = normal(rng, 4, 6, 4, 8), normal(rng, 4, 6, 4, 8), rng.random((4, 6)) > 0.4
  term = logits(losses.localization, output="edges", valid="boxes_valid", temperature=2.0)
  _, mean = evaluate(term, {"edges": s}, {"edges": t}, {"boxes_valid": exist})
  each = 4 * kl(s / 2, t / 2).sum(-1)
  np.testing.assert_allclose(mean, each[exist & ROWS[:, None]].mean(), rtol=1e-4)


def test_pixels_that_are_not_ignored_count(rng):
  s, t = normal(rng, 4, 3, 3, 5), normal(rng, 4, 3, 3, 5)
  pixels = rng.random((4, 3, 3)) > 0.4
  _, mean = evaluate(
    logits(losses.kl_divergence, valid="pixels"), {"logits": s}, {"logits": t}, {"pixels": pixels}
  )
  np.testing.assert_allclose(mean, kl(s, t)[pixels & ROWS[:, None, None]].mean(), rtol=1e-4)


def test_valid_and_labeled_both_count(rng):
  s, t = normal(rng, 4, 3, 5), normal(rng, 4, 3, 5)
  label = rng.integers(0, 5, (4, 3)).astype(np.int32)
  label[0, 1] = -1
  exists = rng.random((4, 3)) > 0.3
  exists[0] = True
  term = logits(losses.dkd, valid="tokens", temperature=1.0)
  values, mean = evaluate(term, {"logits": s}, {"logits": t}, {"label": label, "tokens": exists})
  counted = exists & ROWS[:, None] & (label >= 0)
  np.testing.assert_allclose(mean, values[counted].mean(), rtol=1e-5)
  loss = jax.jit(functools.partial(losses.dkd, temperature=1.0))
  expected = loss(s[counted], t[counted], label[counted])
  np.testing.assert_allclose(values[counted], expected, rtol=1e-4)


def test_pairs_of_outputs_are_aligned_one_by_one(rng):
  student = {"a": normal(rng, 4, 6, 6, 2), "b": normal(rng, 4, 6, 6, 3)}
  teacher = {"a": normal(rng, 4, 6, 6, 2), "b": normal(rng, 4, 6, 6, 5)}
  term = features(("a", "b"), ("a", "b"), losses.fsp)
  params = term.init(KEY, student, teacher).params
  assert params[0] == {} and params[1]["kernel"].shape == (3, 5)
  values, _ = evaluate(term, student, teacher, {})
  b = student["b"] @ np.asarray(params[1]["kernel"])
  expected = losses.fsp((student["a"], b), (teacher["a"], teacher["b"]))
  np.testing.assert_allclose(values[ROWS], expected[ROWS], rtol=1e-4)
  with pytest.raises(ValueError, match="^student, teacher: "):
    features(("a", "b"), ("a",), losses.fsp)
  with pytest.raises(ValueError, match=r"student 'b' .*cannot be aligned with teacher 'c'"):
    term = features(("a", "b"), ("a", "c"), losses.fsp)
    term.init(KEY, student, teacher | {"c": teacher["b"][:, 0]})


def test_missing_entry_of_the_batch_raises(rng):
  z = {"logits": normal(rng, 4, 5)}
  with pytest.raises(ValueError, match="^pixles: .*'pixels'"):
    evaluate(logits(losses.kl_divergence, valid="pixles"), z, z, {"pixels": ROWS})
  with pytest.raises(ValueError, match="^classes: "):
    evaluate(logits(losses.kl_divergence, entries={"class_mask": "classes"}), z, z, {})
