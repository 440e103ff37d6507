"""Small networks for decoding, whose next token depends on all tokens so far and on the source."""

import jax.numpy as jnp
import numpy as np

from distill_jax.distributed import sharding
from distill_jax.models.decoding import DecoderSteps
from distill_jax.types import Variables

END = 0
MULTIPLIER = 7  # of the hash of a prefix


def hashed(steps_seen, tokens, buckets):
  """Returns the hash of a prefix that ends in `tokens`, from the one before."""
  return (steps_seen * MULTIPLIER + tokens + 1) % buckets


def table(vocab_size, *, buckets=97, scale=2.0, seed=0):
  """Returns random logits [buckets, vocab_size], one row for each hash of source and prefix."""
  logits = np.random.default_rng(seed).normal(size=(buckets, vocab_size)) * scale
  return Variables(jnp.asarray(logits, jnp.float32), {})


def steps_of(vocab_size, *, max_length=8, start_token=1, **changes):
  """Returns the steps of a network that looks up its logits by a hash of source and prefix.

  Its cache is that hash: a beam that does not reorder it decodes other logits.
  """

  def start(variables, batch, length):
    del variables, length
    return {"hash": batch["source"].sum(-1).astype(jnp.int32)}

  def step(variables, tokens, position, cache):
    del position
    state = hashed(cache["hash"], tokens, len(variables.params))
    return variables.params[state], {"hash": state}

  fields = dict(start_token=start_token, end_token=END, vocab_size=vocab_size)
  return DecoderSteps(start, step, **(fields | {"max_length": max_length} | changes))


def log_probs(variables, source, prefix, start_token=1):
  """Returns the log-probabilities [V] of the token after a prefix, in float64."""
  logits = np.asarray(variables.params, np.float64)
  state = int(np.sum(source))
  for token in (start_token, *prefix):
    state = hashed(state, token, len(logits))
  z = logits[state]
  z = z - z.max()
  return z - np.log(np.exp(z).sum())


def sources(rows, seed=0, ids=None):
  ids = np.arange(rows) if ids is None else ids
  source = np.random.default_rng(seed).integers(0, 100, (rows, 3))
  return {"id": jnp.asarray(ids), "source": jnp.asarray(source)}


def split_rows(batch):
  """Returns a batch with its rows split over all devices."""
  mesh = sharding.make_mesh()
  return sharding.place_rows(batch, mesh, len(batch["id"]))
