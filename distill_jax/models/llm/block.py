"""Defines the block of a `Decoder`: grouped-query attention and SwiGLU."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.llm.rope import rotate


class Block(nnx.Module):
  """Attention and SwiGLU, each applied to a normalized input and added to it."""

  def __init__(
    self,
    embed_dim: int,
    num_layers: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    qkv_bias: bool,
    qk_norm: bool,
    norm_eps: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds the layers; the arguments are those of `Decoder`, which has `num_layers` such
    blocks."""

    def linear(inputs, outputs, *, bias=False, scale=1.0):
      normal = nnx.initializers.normal(0.02 * scale)
      return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=normal, dtype=dtype, rngs=rngs)

    last_scale = (2 * num_layers) ** -0.5
    self.num_heads = num_heads
    self.num_kv_heads = num_kv_heads
    self.head_dim = head_dim
    # The order of the layers is that of the random numbers that they start with.
    self.attention_norm = rms_norm(embed_dim, norm_eps, dtype, rngs)
    self.query = linear(embed_dim, num_heads * head_dim, bias=qkv_bias)
    self.key = linear(embed_dim, num_kv_heads * head_dim, bias=qkv_bias)
    self.value = linear(embed_dim, num_kv_heads * head_dim, bias=qkv_bias)
    self.query_norm = rms_norm(head_dim, norm_eps, dtype, rngs) if qk_norm else None
    self.key_norm = rms_norm(head_dim, norm_eps, dtype, rngs) if qk_norm else None
    self.output = linear(num_heads * head_dim, embed_dim, scale=last_scale)
    self.inner_norm = rms_norm(embed_dim, norm_eps, dtype, rngs)
    self.gate = linear(embed_dim, mlp_dim)
    self.up = linear(embed_dim, mlp_dim)
    self.down = linear(mlp_dim, embed_dim, scale=last_scale)

  def __call__(self, x, angles, visible, cache=None):
    """Returns the block's sum [B, L, embed_dim], its named outputs, and its keys and values.

    Args:
      x: [B, L, embed_dim].
      angles: from `rotation`.
      visible: bool [B or 1, L, S], where each query attends.
      cache: (keys, values, starts) of S positions, to write to and to read; None: S = L.
    """
    normed = self.attention_norm(x)
    flat = {"queries": self.query(normed), "keys": self.key(normed), "values": self.value(normed)}
    q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in flat.values())
    if self.query_norm is not None and self.key_norm is not None:
      q = self.query_norm(q)
      k = self.key_norm(k)
    q = rotate(q, angles)
    k = rotate(k, angles)
    if cache is not None:
      k, v = (jax.vmap(_write)(old, new, cache[2]) for old, new in zip(cache, (k, v)))
    attended, scores = self._attend(q, k, v, visible)
    x = x + self.output(attended)
    normed = self.inner_norm(x)
    x = x + self.down(nnx.silu(self.gate(normed)) * self.up(normed))
    return x, {**flat, "attention": scores}, (k, v)

  def _attend(self, q, k, v, visible):
    """Returns the attended values [B, L, heads * head_dim] and the scores [B, heads, L, S]."""
    grouped = q.reshape(*q.shape[:2], self.num_kv_heads, -1, self.head_dim)
    scores = jnp.einsum("blkgd,bskd->bkgls", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * self.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    attended = jnp.einsum("bkgls,bskd->blkgd", weights, v).reshape(*q.shape[:2], -1)
    return attended, scores.reshape(scores.shape[0], self.num_heads, *scores.shape[3:])


def rms_norm(size: int, epsilon: float, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """Returns the norm of a block or a head of `size` values."""
  return nnx.RMSNorm(size, epsilon=epsilon, dtype=dtype, rngs=rngs)


def _write(old: Any, new: Any, start: Any):
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 0)
