"""A small encoder-decoder of plain functions, and batches for it: it compiles in a moment."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models import from_apply
from distill_jax.types import Model

VOCABULARY, SOURCE, TARGET = 11, 6, 5
SHAPES = {
  "encoder": {"embed": (VOCABULARY, 8), "kernel": (8, 8)},
  "decoder": {"embed": (VOCABULARY, 8), "head": (8, VOCABULARY)},
}


def weights(key):
  leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [jax.random.normal(k, s) for k, s in zip(keys, leaves)])


def decode(params, tokens, encoded, segments):
  hidden = params["decoder"]["embed"][tokens]
  scores = jnp.einsum("btd,bsd->bts", hidden, encoded)
  scores = jnp.where(segments[:, None] >= 0, scores, -jnp.inf)
  hidden = hidden + jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), encoded)
  head = (params["decoder"]["head"], None, None)
  return {"encoded": encoded, "hidden": hidden, "head": head, "cross_attention1": scores[:, None]}


def network(params, source, segments, tokens):
  embedded = params["encoder"]["embed"][source]
  return decode(params, tokens, jnp.tanh(embedded @ params["encoder"]["kernel"]), segments)


def models(seed=None) -> tuple[Model, Model]:
  """An encoder-decoder, with weights if a seed is given, and a Model of its decoder."""
  variables = None if seed is None else weights(jax.random.key(seed))
  init = lambda key, *inputs: weights(key)  # noqa: E731
  whole, rest = ("source", "source_segments", "tokens"), ("tokens", "encoded", "source_segments")
  return (
    from_apply(init, network, variables=variables, inputs=whole),
    from_apply(init, decode, variables=variables, inputs=rest),
  )


def pairs(rng, rows) -> dict[str, np.ndarray]:
  """A batch of sources and targets of several lengths."""
  lengths, target_lengths = rng.integers(1, SOURCE, rows), rng.integers(1, TARGET, rows)
  source, tokens, label = (
    rng.integers(0, VOCABULARY, (rows, n)).astype(np.int32) for n in (SOURCE, TARGET, TARGET)
  )
  segments = np.where(np.arange(SOURCE) < lengths[:, None], 0, -1).astype(np.int32)
  label = np.where(np.arange(TARGET) < target_lengths[:, None], label, -1).astype(np.int32)
  return {"source": source, "source_segments": segments, "tokens": tokens, "label": label}
