"""Defines the blocks of an `EncoderDecoder`, and the stack of them on either side."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.remat import rematerialized
from distill_jax.models.seq2seq.attention import Attention, linear
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.seq2seq.positions import relative_buckets


class Block(nnx.Module):
  """Self-attention, in a decoder attention to the source, and a perceptron; each adds to its
  input."""

  def __init__(
    self, config: EncoderDecoderConfig, *, depth: int, decoder: bool, dtype: Any, rngs: nnx.Rngs
  ):
    """Builds the layers; `depth` is the number of branches of the stack."""
    width = config.embed_dim
    options = {"dtype": dtype, "rngs": rngs}
    self.norm_first = config.layout.norm_first
    self.activation = config.activation
    self.attention_norm = norm(config, **options)
    self.attention = Attention(config, depth=depth, **options)
    self.cross_norm = norm(config, **options) if decoder else None
    cross: Any = Attention(config, depth=depth, **options) if decoder else None
    self.cross = cross
    self.inner_norm = norm(config, **options)
    options["bias"] = config.layout.bias
    is_gated = config.activation.startswith("gated")
    self.gate = linear(width, config.mlp_dim, **options) if is_gated else None
    self.up = linear(width, config.mlp_dim, **options)
    self.down = linear(config.mlp_dim, width, scale=depth**-0.5, **options)

  def __call__(self, x, visible, bias, source=None, cache=None):
    """Returns the block's sum [B, T, embed_dim], its named scores, and its keys and values.

    Args:
      x: [B, T, embed_dim].
      visible, bias: of self-attention, as in `Attention`.
      source: (keys, values, visible) of the source, in a decoder.
      cache: (keys, values, position): those of earlier tokens, where x is written to `position`;
        None: x has all tokens.
    """
    inputs = self._before(self.attention_norm, x)
    keys, values = self.attention.keys_values(inputs)
    if cache is not None:
      *old, position = cache
      keys, values = (_write(a, b, position) for a, b in zip(old, (keys, values), strict=True))
    read, scores = self.attention(inputs, keys, values, visible, bias)
    named = {"attention": scores}
    x = self._after(self.attention_norm, x + read)
    if self.cross is not None:
      read, scores = self.cross(self._before(self.cross_norm, x), *source)
      named["cross_attention"] = scores
      x = self._after(self.cross_norm, x + read)
    x = self._after(self.inner_norm, x + self._perceptron(self._before(self.inner_norm, x)))
    return x, named, (keys, values)

  def _before(self, norm, x):
    return norm(x) if self.norm_first else x

  def _after(self, norm, x):
    return x if self.norm_first else norm(x)

  def _perceptron(self, x):
    inner = self.up(x)
    if self.gate is not None:
      inner = jax.nn.gelu(self.gate(x)) * inner
    elif self.activation == "gelu":
      inner = jax.nn.gelu(inner, approximate=False)
    else:
      inner = {"relu": nnx.relu, "swish": nnx.silu}[self.activation](inner)
    return self.down(inner)


class Stack(nnx.Module):
  """The blocks of an encoder or a decoder, and the norm that ends them."""

  def __init__(
    self,
    config: EncoderDecoderConfig,
    *,
    decoder: bool,
    dtype: Any,
    remat: str,
    rngs: nnx.Rngs,
  ):
    num_layers = config.decoder_layers if decoder else config.encoder_layers
    depth = num_layers * (3 if decoder else 2)
    self.causal = decoder
    self.remat = remat
    self.relative = config.relative
    if config.relative is None:
      self.buckets = None
    else:
      normal = nnx.initializers.normal(config.embed_dim**-0.5)
      shape = config.relative.num_buckets, config.num_heads
      self.buckets = nnx.Param(normal(rngs.params(), shape, jnp.float32))
    self.blocks = nnx.data(
      [
        Block(config, depth=depth, decoder=decoder, dtype=dtype, rngs=rngs)
        for _ in range(num_layers)
      ]
    )
    self.norm = norm(config, dtype=dtype, rngs=rngs) if config.layout.norm_first else None

  def __call__(self, x, visible, encoded=None, source_visible=None):
    """Returns the hidden states after the last norm, and the named outputs of each block.

    Args:
      x: embeddings [B, T, embed_dim].
      visible: bool, where each token attends to its own sequence, as in `Attention`.
      encoded: [B, S, embed_dim], in a decoder.
      source_visible: bool, where each token attends to the source.
    """
    run = rematerialized(Block.__call__, self.remat)
    positions = jnp.arange(x.shape[1])
    bias = self._bias(positions, positions)
    outputs: dict[str, jax.Array] = {}
    for k, block in enumerate(self.blocks, 1):
      source = None
      if encoded is not None:
        source = *block.cross.keys_values(encoded), source_visible
      x, named, _ = run(block, x, visible, bias, source)
      outputs |= {f"block{k}": x} | {f"{name}{k}": value for name, value in named.items()}
    return self.finish(x), outputs

  def extend(self, x, position, keys_values, sources):
    """Returns the hidden states of one more token, and the new keys and values of each block.

    Args:
      x: embedding [B, 1, embed_dim].
      position: int scalar, of the token.
      keys_values: for each block (keys, values) of all positions [B, L, heads, head_dim].
      sources: for each block (keys, values, visible) of the source.
    """
    cached = jnp.arange(keys_values[0][0].shape[1])
    visible = cached <= position
    bias = self._bias(position[None], cached)
    new = []
    for block, own, source in zip(self.blocks, keys_values, sources, strict=True):
      x, _, block_kv = block(x, visible, bias, source, (*own, position))
      new.append(block_kv)
    return self.finish(x), tuple(new)

  def finish(self, x):
    """Returns the hidden states after the last norm, in a family that has one."""
    return x if self.norm is None else self.norm(x)

  def _bias(self, query_positions, key_positions):
    """Returns what relative positions add to the scores, [1, heads, T, S], or None."""
    if self.relative is None or self.buckets is None:
      return None
    causal = self.causal
    buckets = relative_buckets(query_positions, key_positions, self.relative, causal=causal)
    return self.buckets[...][buckets].transpose(2, 0, 1)[None]


def norm(config: EncoderDecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
  """Returns a norm of hidden states."""
  options = {"epsilon": config.norm_eps, "dtype": dtype, "rngs": rngs}
  if config.layout.rms_norm:
    return nnx.RMSNorm(config.embed_dim, **options)
  # The fast variance, E[x^2] - E[x]^2, loses digits on the large channels of released models.
  options["use_fast_variance"] = False
  return nnx.LayerNorm(config.embed_dim, use_bias=config.layout.bias, **options)


def _write(old: jax.Array, new: jax.Array, position: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, 1)
