"""A CTC network of one convolution on random frames, with transcripts that can be learned."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.types import Model, Variables

ROWS, T, F, V, U = 24, 8, 6, 5, 3


def source(**changes):
  """Returns frames whose largest channel is a class, and transcripts of 0 to 3 classes.

  Row 0 has too many equal neighbors for its frames, row 1 is silence with an empty transcript, row
  2 has no transcript.
  """
  rng = np.random.default_rng(0)
  features = rng.normal(size=(ROWS, T, F)).astype(np.float32) / 4
  label = np.zeros((ROWS, U), np.int32)
  frames = rng.integers(6, T + 1, ROWS).astype(np.int32)
  for row in range(3, ROWS):
    label[row] = rng.permutation(np.arange(1, V))[:U]
    for position, number in enumerate(label[row]):
      features[row, 2 * position : 2 * position + 2, number] += 3
  frames[0], label[0] = 3, [1, 1, 2]
  features[1] = 0
  label[2] = -1
  features *= np.arange(T)[None, :, None] < frames[:, None, None]
  arrays = {"features": features, "frames": frames, "label": label} | changes
  return data.Source(arrays, V, ignore_label=-1, name="frames")


def network(seed=0, width=8, scale=1.0, stride=1):
  """Returns a Model whose weights are a function of the seed; padded frames have large logits."""

  def init(key, batch):
    del key, batch
    rng, shapes = np.random.default_rng(seed), {"mix": (3, F, width), "head": (width, V)}
    params = {
      name: jnp.asarray(scale * rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5, jnp.float32)
      for name, shape in shapes.items()
    }
    return Variables(params, {})

  def apply(params, state, batch, *, train, key):
    x = jax.lax.conv_general_dilated(
      batch["features"], params["mix"], (stride,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    hidden = jax.nn.relu(x)
    lengths = -(-batch["frames"] // stride)
    is_valid = jnp.arange(x.shape[1]) < lengths[:, None]
    logits = jnp.where(is_valid[..., None], hidden @ params["head"], 50.0)
    return {"logits": logits, "lengths": lengths, "block1": hidden}, state

  return Model(init, apply)


def frozen(seed=1, **options):
  """Returns a network with its weights."""
  model = network(seed, **options)
  return model._replace(variables=model.init(None, None))
