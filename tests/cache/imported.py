"""Builds rows of teacher outputs as others compute them."""

import jax
import numpy as np


def lists_of(logits, k, temperature=1.0):
  """Returns 'indices' and 'logprobs' [..., k] of logits [..., V], as a float32 program has them."""
  log_probs = np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float32) / temperature))
  indices = np.argsort(-log_probs, axis=-1, kind="stable")[..., :k]
  return {"indices": indices, "logprobs": np.take_along_axis(log_probs, indices, -1)}


def columns_of(cache, source, part="teacher/"):
  """Returns the stored columns of all examples of a source."""
  batch = cache.add_columns({"id": np.sort(source.ids)})
  return {name: x for name, x in batch.items() if name.startswith(part)}
