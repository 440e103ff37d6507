"""Defines the block of an `Encoder`: attention to both sides and a perceptron, normed after."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.models.encoders.encoder_config import EncoderConfig


class EncoderBlock(nnx.Module):
  """Attention and a perceptron with GELU; the sum with each one's input is normalized."""

  def __init__(self, config: EncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
    width = config.embed_dim
    self.num_heads = config.num_heads
    # The order of the layers is that of the random numbers that they start with.
    self.query = linear(width, width, dtype, rngs)
    self.key = linear(width, width, dtype, rngs)
    self.value = linear(width, width, dtype, rngs)
    self.output = linear(width, width, dtype, rngs)
    self.attention_norm = layer_norm(config, dtype, rngs)
    self.up = linear(width, config.mlp_dim, dtype, rngs)
    self.down = linear(config.mlp_dim, width, dtype, rngs)
    self.inner_norm = layer_norm(config, dtype, rngs)

  def __call__(self, x, visible):
    """Returns the block's output, of the shape of x [B, L, embed_dim], and its named outputs.

    Args:
      x: [B, L, embed_dim].
      visible: bool [B, L, L], where each query attends; None: everywhere.
    """
    flat = {"queries": self.query(x), "keys": self.key(x), "values": self.value(x)}
    q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in flat.values())
    mask = None if visible is None else visible[:, None]
    attended = jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
    x = self.attention_norm(x + self.output(attended))
    x = self.inner_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))
    # Under jit, what no term reads is not computed.
    return x, {**flat, "attention": attention_scores(q, k, mask)}


def attention_scores(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Returns scores before the softmax, float32 [B, heads, L, L], -inf where the mask is False.

  Args:
    q, k: queries and keys [B, L, heads, head_dim].
    mask: bool [B, 1, L, L]; None: all pairs.
  """
  wide = reduce.common_dtype(q.dtype, jnp.float32)
  scores = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
  return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def layer_norm(config: EncoderConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Returns a norm of hidden states."""
  # The fast variance, E[x^2] - E[x]^2, loses digits on the large channels of released models.
  return nnx.LayerNorm(
    config.embed_dim,
    epsilon=config.norm_eps,
    use_bias=config.family != "modernbert",
    use_fast_variance=False,
    dtype=dtype,
    rngs=rngs,
  )


def linear(
  inputs: int,
  outputs: int,
  dtype: Any,
  rngs: nnx.Rngs,
  *,
  bias: bool = True,
  scale: float = 1.0,
) -> nnx.Linear:
  """Returns a linear layer with BERT's initial kernel, normal with deviation 0.02 `scale`."""
  normal = nnx.initializers.normal(0.02 * scale)
  return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=normal, dtype=dtype, rngs=rngs)
