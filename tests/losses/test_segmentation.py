"""Per-pixel distillation: pixels with an ignore label have no effect."""

import jax
import numpy as np
import optax
from logit_references import kl_divergence, softmax

from distill_jax import losses, objectives
from distill_jax.models import from_apply
from distill_jax.train import make_init, make_train_step

IGNORED = 255  # As in VOC, Cityscapes and ADE20K.


def test_ignored_pixels_reach_neither_metrics_nor_gradient(rng):
  images = rng.normal(size=(4, 6, 6, 3)).astype(np.float32)
  label = np.where(rng.random((4, 6, 6)) < 0.3, IGNORED, rng.integers(0, 5, (4, 6, 6)))
  valid, pixels = np.array([True, True, False, True]), label != IGNORED
  start, teacher_outputs = rng.normal(size=(2, 3, 5)).astype(np.float32)
  student, teacher = (
    from_apply(None, lambda w, x: x @ w, variables=w) for w in (start, teacher_outputs)
  )
  objective = objectives.weighted(
    hard=(1.0, objectives.labels(ignore_label=IGNORED)),
    soft=(1.0, objectives.logits(losses.kl_divergence, ignore_label=IGNORED, temperature=2.0)),
    target=(1.0, objectives.logits(losses.dkd, ignore_label=IGNORED, temperature=2.0)),
  )
  batch = {"image": images, "where": valid, "label": label.astype(np.int32)}
  state = make_init(student, teacher, objective, optax.sgd(1.0))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, teacher, objective, optax.sgd(1.0)))
  after, metrics = step(state, teacher.variables, batch)

  counts = pixels & valid[:, None, None]
  s, t, y = images[counts] @ start, images[counts] @ teacher_outputs, label[counts]
  expected = {
    "soft": kl_divergence(s, t, temperature=2.0),
    "hard": -np.log(softmax(s)[np.arange(len(y)), y]),
  }
  for name, values in expected.items():
    total, count = metrics[name]
    assert count == counts.sum()
    np.testing.assert_allclose(total, values.sum(), rtol=1e-5)

  @jax.jit
  @jax.grad
  def gradient(w):
    z = images[counts] @ w
    hard = optax.softmax_cross_entropy_with_integer_labels(z, y)
    soft = losses.kl_divergence(z, t, temperature=2.0)
    return (hard + soft + losses.dkd(z, t, y, temperature=2.0)).mean()

  np.testing.assert_allclose(after.params["student"], start - gradient(start), rtol=1e-4, atol=1e-5)
