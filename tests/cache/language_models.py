"""Builds rows of tokens, and language models that return hidden states and a head."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data import text
from distill_jax.models import from_apply
from distill_jax.types import Model, Variables

VOCABULARY, LENGTH = text.BYTES.size, 13


def token_rows(rng, length=LENGTH, number=24):
  words = [bytes(rng.integers(97, 123, n).tolist()) for n in rng.integers(1, 40, number)]
  return text.pack([text.BYTES.encode(word) for word in words], length=length, name="words")


def language_model(
  seed, width=6, *, softcap=None, bias=False, exact=True, logits=False, **kwargs
) -> Model:
  """Returns a model whose hidden states depend on a token and the one before.

  Args:
    seed: of its weights.
    width: of the hidden states.
    softcap: of its head.
    bias: whether its head has one.
    exact: whether its weights are halves of small integers, whose sums are exact in float32.
    logits: whether it returns logits instead of hidden states and a head.
    kwargs: of `from_apply`.
  """
  shapes = {
    "token": (VOCABULARY, width),
    "previous": (VOCABULARY, width),
    "head": (width, VOCABULARY),
  }
  shapes |= {"bias": (VOCABULARY,)} if bias else {}

  def init(key, tokens):
    del tokens
    keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
    return {name: jax.random.normal(keys[name], shape) for name, shape in shapes.items()}

  def apply(params, tokens):
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    hidden = params["token"][tokens] + params["previous"][previous]
    if logits:
      return {"logits": logits_of(hidden, params["head"], params.get("bias"), softcap)}
    return {"hidden": hidden, "head": (params["head"], params.get("bias"), softcap)}

  rng = np.random.default_rng(seed)
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  if exact:
    params = {name: np.round(2 * x) / 2 for name, x in params.items()}
  params = {name: jnp.asarray(x) for name, x in params.items()}
  return from_apply(init, apply, inputs="tokens", **kwargs)._replace(
    variables=Variables(params, {})
  )


def with_params(model, **params):
  """Returns the model with other arrays of these names."""
  variables = model.variables
  return model._replace(variables=variables._replace(params=variables.params | params))


def logits_of(hidden, kernel, bias=None, softcap=None):
  logits = hidden @ kernel + (0 if bias is None else bias)
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
