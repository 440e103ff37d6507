"""Defines attention to the keys and values of the same tokens, of a source, or of a cache."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.models.seq2seq.encoder_decoder_config import Layout


class AttentionConfig(Protocol):
  """Sizes and layout of attention, such as those of an `EncoderDecoderConfig`."""

  @property
  def embed_dim(self) -> int: ...

  @property
  def num_heads(self) -> int: ...

  @property
  def head_dim(self) -> int: ...

  @property
  def layout(self) -> Layout: ...


class Attention(nnx.Module):
  """Queries of one sequence read the values of another, or of the same."""

  def __init__(self, config: AttentionConfig, *, depth: int, dtype: Any, rngs: nnx.Rngs):
    """Builds the layers.

    Args:
      config: the network.
      depth: number of branches of the stack, whose sum starts with the deviation of one.
      dtype: of the computation.
      rngs: stream `params`.
    """
    layout = config.layout
    inner = config.num_heads * config.head_dim
    options = {"dtype": dtype, "rngs": rngs, "bias": layout.bias}
    self.head_dim = config.head_dim
    self.scale = config.head_dim**-0.5 if layout.attention_scale else 1.0
    # Without a scale of the scores, the queries start smaller instead.
    query_scale = 1.0 if layout.attention_scale else config.head_dim**-0.5
    key_options = {**options, "bias": layout.bias and layout.key_bias}
    # The order of the layers is that of the random numbers that they start with.
    self.query = linear(config.embed_dim, inner, scale=query_scale, **options)
    self.key = linear(config.embed_dim, inner, **key_options)
    self.value = linear(config.embed_dim, inner, **options)
    self.output = linear(inner, config.embed_dim, scale=depth**-0.5, **options)

  def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values [B, S, heads, head_dim] of hidden states [B, S, embed_dim]."""
    return self._heads(self.key(x)), self._heads(self.value(x))

  def __call__(self, x, keys, values, visible, bias=None):
    """Returns what the queries read [B, T, embed_dim], and the scores before the softmax.

    Args:
      x: [B, T, embed_dim].
      keys, values: [B, S, heads, head_dim].
      visible: bool, to be broadcast to [B, heads, T, S], where each query attends; None:
        everywhere. A query that attends nowhere reads the mean of all values.
      bias: added to the scores, as `visible` broadcast; None: nothing.

    Returns:
      The sum, and the scores [B, heads, T, S], float32, -inf where a query does not attend.
    """
    q = self._heads(self.query(x))
    wide = reduce.common_dtype(q.dtype, jnp.float32)
    scores = jnp.einsum("bthd,bshd->bhts", q, keys, preferred_element_type=wide) * self.scale
    if bias is not None:
      scores = scores + bias
    finite = scores
    if visible is not None:
      # A softmax over nothing but -inf would be NaN, and so would the gradients of all rows.
      finite = jnp.where(visible, scores, jnp.finfo(wide).min)
      scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(finite).astype(x.dtype)
    read = jnp.einsum("bhts,bshd->bthd", weights, values)
    return self.output(read.reshape(*x.shape[:2], -1)), scores

  def _heads(self, x):
    return x.reshape(*x.shape[:2], -1, self.head_dim)


def linear(
  inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs, bias: bool, scale: float = 1.0
) -> nnx.Linear:
  """Returns a linear layer that keeps the variance of its inputs times `scale`^2."""
  normal = nnx.initializers.normal(scale * inputs**-0.5)
  return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=normal, dtype=dtype, rngs=rngs)
