"""Averages over views: probabilities of logits, means of features, in evaluate and in fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

from distill_jax import data, models, objectives, tasks
from distill_jax.data.clips import random_clip, uniform_clips
from distill_jax.data.stream import EvalStream, Stream
from distill_jax.data.videos import Videos
from distill_jax.train import Evaluation, evaluate, fit

RNG = np.random.default_rng(0)


def network(w, image, valid=None):
  """Clips [B, T, C] -> logits and what averages otherwise."""
  steps = image if valid is None else jnp.where(valid[..., None], image, 0)
  logits = steps.sum(1) @ w
  return {
    "logits": logits,
    "steps": steps,
    "class": logits.argmax(-1),
    "penalty": jnp.float32(2),
  }


def linear(inputs="image", w=None):
  w = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32) if w is None else w
  return models.from_apply(lambda key, *x: w, network, inputs=inputs)


def apply(model, batch, w):
  run = jax.jit(lambda w, batch: model.apply(w, {}, batch, train=False, key=None)[0])
  return run(w, batch)


def test_views_are_averaged():
  w = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
  model, single = models.average_views(linear(), ndim=3), linear()
  image = jnp.asarray(RNG.normal(size=(4, 5, 6, 2)), jnp.float32)
  outputs = apply(model, {"image": image, "label": jnp.zeros(4, int)}, w)
  rows = apply(single, {"image": image.reshape(20, 6, 2)}, w)
  views = {name: np.asarray(x).reshape(4, 5, *x.shape[1:]) for name, x in rows.items() if x.ndim}
  mean = softmax(np.float64(views["logits"]), -1).mean(1)
  np.testing.assert_allclose(np.exp(np.float64(outputs["logits"])), mean, rtol=1e-5)
  np.testing.assert_allclose(outputs["steps"], image.mean(1), atol=1e-6)
  np.testing.assert_array_equal(outputs["class"], views["class"])
  assert outputs["penalty"] == 2


def test_single_views_go_through():
  w = jnp.ones((2, 3))
  batch = {"image": jnp.asarray(RNG.normal(size=(4, 6, 2)), jnp.float32)}
  expected = apply(linear(), batch, w)
  outputs = apply(models.average_views(linear(), ndim=3), batch, w)
  assert all((outputs[name] == expected[name]).all() for name in expected)


def test_masks_have_views_and_other_entries_are_repeated():
  w = jnp.ones((2, 3))
  image = jnp.asarray(RNG.normal(size=(2, 3, 4, 2)), jnp.float32)
  valid = jnp.asarray(RNG.random((2, 3, 4)) > 0.5)
  entries = ("image", "image_valid")
  both = models.average_views(linear(entries), ndim=3, entries=entries)
  outputs = apply(both, {"image": image, "image_valid": valid}, w)
  np.testing.assert_allclose(outputs["steps"], (image * valid[..., None]).mean(1), atol=1e-6)
  one = models.average_views(linear(entries), ndim=3)
  outputs = apply(one, {"image": image, "image_valid": valid[:, 0]}, w)
  expected = (image * valid[:, :1, :, None]).mean(1)
  np.testing.assert_allclose(outputs["steps"], expected, atol=1e-6)


@pytest.mark.parametrize(
  "batch, field",
  [
    ({"image": jnp.ones((2, 3))}, "image"),
    ({"image": jnp.ones((2, 3, 4, 2, 1))}, "image"),
    ({"x": jnp.ones((2, 3, 2))}, "entries"),
    ({"image": jnp.ones((2, 3, 4, 2)), "image_valid": jnp.ones((2, 4), bool)}, "image_valid"),
  ],
)
def test_batch_that_does_not_fit_is_refused(batch, field):
  entries = ("image", "image_valid") if "image_valid" in batch else ("image",)
  model = models.average_views(linear(entries[0]), ndim=3, entries=entries)
  with pytest.raises(ValueError, match=f"^{field}"):
    model.init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=f"^{field}"):
    apply(model, batch, jnp.ones((2, 3)))


def test_student_of_clips_is_evaluated_on_averaged_views():
  """`fit` trains on single clips and scores the averages that `evaluate` scores."""
  frames = [np.float32(RNG.normal(size=(n, 2)) + n % 3) for n in range(6, 16)]
  label = np.array([len(video) % 3 for video in frames])
  videos = Videos(frames, data.Source({"label": label}, classes=3))
  views = EvalStream(videos, 8, uniform_clips(4, clips=3), threads=2)
  student = models.average_views(linear(w=jnp.zeros((2, 3))), ndim=3)
  result = fit(
    student,
    None,
    objectives.weighted(hard=(1.0, objectives.labels())),
    optax.sgd(0.01),
    Stream(videos, 8, random_clip(4, seed=0), seed=0, threads=2),
    steps=2,
    batch_size=8,
    task=tasks.classification(),
    evaluation=Evaluation(views, every=2),
  )
  w = result.variables.params
  logits = [uniform_clips(4, clips=3)(x, 0, 0).sum(1) @ np.asarray(w) for x in frames]
  mean = np.stack([softmax(np.float64(x), -1).mean(0) for x in logits])
  nll = -np.log(mean[np.arange(10), label]).mean()
  assert abs(w).max() > 0
  scores = evaluate(student, result.variables, views, tasks.classification())
  assert scores["nll"] == pytest.approx(nll, rel=1e-5)
  assert result.history[-1]["nll"] == pytest.approx(nll, rel=1e-5)
