"""Defines the block of modern encoders (ModernBERT, Warner et al. 2024): normed before, rotary
positions, gated GELU, no biases, and attention to near tokens in most layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.encoders.encoder_block import attention_scores, layer_norm, linear
from distill_jax.models.encoders.encoder_config import EncoderConfig, ModernOptions
from distill_jax.models.llm.rope import rotate, rotation


class RotaryBlock(nnx.Module):
  """Attention and a gated perceptron, each applied to a normalized input and added to it."""

  def __init__(self, config: EncoderConfig, *, first: bool, dtype: Any, rngs: nnx.Rngs):
    """Builds the layers; the first block of a network has the norm of the embeddings instead of one
    of its own."""
    width = config.embed_dim
    options = {"dtype": dtype, "rngs": rngs, "bias": False}
    # 1 / sqrt(2 layers) at the end of a branch, as in GPT-2.
    last = {**options, "scale": (2 * config.num_layers) ** -0.5}
    self.num_heads = config.num_heads
    # The order of the layers is that of the random numbers that they start with.
    self.attention_norm = None if first else layer_norm(config, dtype, rngs)
    self.qkv = linear(width, 3 * width, **options)
    self.output = linear(width, width, **last)
    self.inner_norm = layer_norm(config, dtype, rngs)
    self.up = linear(width, 2 * config.mlp_dim, **options)
    self.down = linear(config.mlp_dim, width, **last)

  def __call__(self, x, visible, angles):
    """Returns the block's sum, of the shape of x [B, L, embed_dim], and its named outputs.

    Args:
      x: [B, L, embed_dim].
      visible: bool [B or 1, L, L], where each query attends; None: everywhere.
      angles: from `rotation`.
    """
    normed = x if self.attention_norm is None else self.attention_norm(x)
    queries, keys, values = jnp.split(self.qkv(normed), 3, -1)
    q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (queries, keys, values))
    q = rotate(q, angles)
    k = rotate(k, angles)
    mask = None if visible is None else visible[:, None]
    x = x + self.output(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))
    inner, gate = jnp.split(self.up(self.inner_norm(x)), 2, -1)
    x = x + self.down(nnx.gelu(inner, approximate=False) * gate)
    # Under jit, what no term reads is not computed.
    scores = attention_scores(q, k, mask)
    return x, {"queries": queries, "keys": keys, "values": values, "attention": scores}


def rotary_inputs(config: EncoderConfig, modern: ModernOptions, visible, positions) -> list:
  """Returns the inputs (visible, angles) of each block.

  Args:
    config, modern: the network.
    visible: bool [B, L, L], the tokens of the same text; None: all.
    positions: int [B, L].
  """
  head_dim = config.embed_dim // config.num_heads
  everywhere = visible, rotation(positions, head_dim, modern.global_theta)
  near = everywhere
  if modern.global_every > 1:
    index = jnp.arange(positions.shape[1])
    is_near = (abs(index[:, None] - index[None]) <= modern.window // 2)[None]
    local = is_near if visible is None else visible & is_near
    near = local, rotation(positions, head_dim, modern.local_theta)
  return [near if k % modern.global_every else everywhere for k in range(config.num_layers)]
