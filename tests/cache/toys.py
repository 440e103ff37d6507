"""A small set of images, a linear teacher and a cache of what it says."""

import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.cache import Dense, write_cache
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.zoo.mlp import MLP

CLASSES, ROWS = 5, 60
AUGMENT = data.augmentation(data.shift_crop(1), data.flip(), seed=3)


def images(rng):
  """Ids that are neither sorted nor without gaps."""
  ids = rng.permutation(200)[:ROWS]
  pixels = rng.normal(size=(ROWS, 4, 4, 1)).astype(np.float32)
  return data.Source(
    {"id": ids, "image": pixels, "label": rng.integers(0, CLASSES, ROWS)}, CLASSES, name="toy"
  )


def linear(seed=0, scale=1.0):
  kernel = scale * np.random.default_rng(seed).normal(size=(16, CLASSES)).astype(np.float32)
  apply = lambda w, x: (x.reshape(len(x), -1) @ w, {"hidden": x.reshape(len(x), -1)})  # noqa: E731
  return from_apply(None, apply, variables=jnp.asarray(kernel))


def student(width=8):
  return from_nnx(lambda rngs: MLP(16, (width,), CLASSES, rngs=rngs))


def written(folder, source, teacher=None, outputs=None, **settings):
  outputs = outputs or {"logits": Dense("float32")}
  settings = dict(batch_size=16, progress=False) | settings
  return write_cache(folder, teacher or linear(), source, outputs, **settings)
