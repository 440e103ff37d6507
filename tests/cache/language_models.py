"""Rows of tokens, and language models that look one token back and give hidden states and a head."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data import text
from distill_jax.models import from_apply
from distill_jax.types import Model, Variables

VOCABULARY, LENGTH = text.BYTES.size, 13


def rows(rng, length=LENGTH, number=24):
  words = [bytes(rng.integers(97, 123, n).tolist()) for n in rng.integers(1, 40, number)]
  return text.pack([text.BYTES.encode(word) for word in words], length=length, name="words")


def language_model(
  seed, width=6, *, softcap=None, bias=False, whole=True, logits=False, **kwargs
) -> Model:
  """Its sums are exact in float32, in any order, where `whole`: halves of small integers."""

  def init(key, tokens):
    del tokens
    shapes = {
      "here": (VOCABULARY, width),
      "before": (VOCABULARY, width),
      "head": (width, VOCABULARY),
    }
    shapes |= {"bias": (VOCABULARY,)} if bias else {}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
    drawn = {name: jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    return {name: jnp.round(2 * x) / 2 for name, x in drawn.items()} if whole else drawn

  def apply(w, tokens):
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    hidden = w["here"][tokens] + w["before"][before]
    if logits:
      return {"logits": made(hidden, w["head"], w.get("bias"), softcap)}
    return {"hidden": hidden, "head": (w["head"], w.get("bias"), softcap)}

  model = from_apply(init, apply, inputs="tokens", **kwargs)
  example = {"tokens": np.zeros((1, 2), np.int32)}
  return model._replace(variables=Variables(*model.init(jax.random.key(seed), example)))


def made(hidden, kernel, bias=None, softcap=None):
  z = hidden @ kernel + (0 if bias is None else bias)
  return z if softcap is None else softcap * jnp.tanh(z / softcap)
