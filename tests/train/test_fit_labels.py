"""What `fit` does with labels: unlabeled rows, marks of no label, and those that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import data, objectives
from distill_jax.distributed import sharding
from distill_jax.models import from_apply

IMAGE = np.ones((4, 1), np.float32)


def linear(outputs):
  """Returns a student without hidden layers, which starts with zeros."""

  def apply(w, image):
    return image.reshape(len(image), -1) @ w

  return from_apply(lambda key, x: jnp.zeros((x[0].size, outputs)), apply)


def hard(loss=None, **options):
  return objectives.weighted(hard=(1.0, objectives.labels(loss, **options)))


def fitted(student, source, objective=None, steps=1, **options):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  student = linear(student) if isinstance(student, int) else student
  return fit_with(
    student, None, hard() if objective is None else objective, optax.sgd(0.25), source,
    steps=steps, batch_size=4, mesh=mesh, **options,
  )  # fmt: skip


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
def test_examples_mixed_with_unlabeled_ones_train(mix):
  arrays = {"image": np.ones((4, 8, 8, 1), np.float32), "label": np.array([0, -1, -1, 2])}
  source = data.Source(arrays, classes=3, ignore_label=-1)
  result = fitted(3, source, steps=2, mix=mix(1.0, 3), log_every=1)
  assert result.history[-1]["nonfinite"] == 0
  assert np.isfinite(result.history[-1]["loss"])
  assert np.abs(result.variables.params).max() > 0
