"""Builds a small set of images, a linear teacher, and caches of its outputs."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.cache import Dense, write_cache
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.zoo.mlp import MLP

CLASSES, ROWS = 5, 60
AUGMENT = data.augmentation(data.shift_crop(1), data.flip(), seed=3)


def images(rng):
  """Returns examples whose ids are neither sorted nor without gaps."""
  ids = rng.permutation(200)[:ROWS]
  pixels = short(rng.normal(size=(ROWS, 4, 4, 1)))
  labels = rng.integers(0, CLASSES, ROWS)
  return data.Source({"id": ids, "image": pixels, "label": labels}, CLASSES, name="toy")


def short(values):
  """Returns float32 with few bits, whose products `linear` adds without rounding: programs of
  another batch size or instruction set then return the same bits."""
  return (np.round(16 * values) / 16).astype(np.float32)


def linear(seed=0, scale=1.0):
  kernel = short(scale * np.random.default_rng(seed).normal(size=(16, CLASSES)))

  def apply(w, x):
    rows = x.reshape(len(x), -1)
    return rows @ w, {"hidden": rows}

  return from_apply(None, apply, variables=jnp.asarray(kernel))


def teacher_logits(images, temperature=1.0):
  """Returns the logits of `linear()`, float64 [N, CLASSES]."""
  kernel = np.float64(linear().variables.params)
  return images.reshape(len(images), -1).astype(np.float64) @ kernel / temperature


def student(width=8):
  return from_nnx(lambda rngs: MLP(16, (width,), CLASSES, rngs=rngs))


def written(folder, source, teacher=None, outputs=None, **settings):
  outputs = outputs or {"logits": Dense("float32")}
  settings = dict(batch_size=16, progress=False) | settings
  return write_cache(folder, teacher or linear(), source, outputs, **settings)


def largest_difference(a, b):
  """Returns the largest difference between the student's parameters of two `FitResult`s."""
  distances = jax.tree.map(
    lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a.state.params, b.state.params
  )
  return max(jax.tree.leaves(distances))
