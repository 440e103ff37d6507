"""A small decoder that several tests share, with compiled programs for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder, DecoderOptions

VOCAB_SIZE = 19
PACKED = ("tokens", "segments", "positions")
OPTIONS = DecoderOptions(max_length=64)


def make(**arguments):
  """Returns a function of nnx.Rngs that makes the decoder."""
  sizes = {"num_kv_heads": 2, "options": OPTIONS}
  return lambda rngs: Decoder(VOCAB_SIZE, 16, 2, 4, **sizes | arguments, rngs=rngs)


def random_params(**arguments):
  """Returns parameters far from their small initial values."""
  model = from_nnx(make(**arguments), inputs="tokens")
  shapes = jax.eval_shape(model.init, jax.random.key(0), {}).params
  rng = np.random.default_rng(1)

  def value(path, leaf):
    values = 0.3 * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path))
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(value, shapes)


def merge(params, **arguments):
  """Returns the module with these parameters."""
  return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(**arguments)(nnx.Rngs(0)))), params)


@functools.cache
def compiled(entries=1, **arguments):
  """Returns a jitted function (params, tokens, ...) -> outputs for the first entries of PACKED."""
  model = from_nnx(make(**arguments), inputs=PACKED[:entries])

  def run(params, *arrays):
    return model.apply(params, {}, dict(zip(PACKED, arrays)), train=True, key=None)[0]

  return jax.jit(run)
