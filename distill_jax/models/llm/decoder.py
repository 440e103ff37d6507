"""Defines decoder-only transformers of the Llama and Qwen kind, which output hidden states.

    student = from_nnx(
      lambda rngs: Decoder(256, 128, 4, 4, rngs=rngs), inputs=("tokens", "segments", "positions")
    )
 RMSNorm (Zhang & Sennrich 2019) before each part, rotary positions (Su et al. 2021), grouped
queries (Ainslie et al. 2023) and SwiGLU (Shazeer 2020), as in LLaMA (Touvron et al. 2023).
huggingface.py loads released checkpoints, sampling.py generates text.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.llm.block import Block, rms_norm
from distill_jax.models.llm.rope import RopeScaling, rotation
from distill_jax.models.llm.token_rows import check_token_rows, embed_tokens, token_positions
from distill_jax.models.remat import check_policy, rematerialized
from distill_jax.types import Outputs


class KVCache(NamedTuple):
  """Rotated keys and values so far: for each block an array [B, S, num_kv_heads, head_dim]."""

  keys: tuple[jax.Array, ...]  # One array a block: with one for all, each new token would copy all.
  values: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
  """What a `Decoder` computes with and no parameter shows; released models differ in it.

  Attributes:
    max_length: maximum number of tokens in a sequence.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: stretched wavelengths of models that were first trained on shorter sequences;
      None: as they are.
    norm_eps: epsilon of the RMSNorms.
    softcap: bound of the logits' absolute value, output with the head; None: no bound.
  """

  max_length: int = 2048
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-6
  softcap: float | None = None


class Decoder(nnx.Module):
  """An embedding, blocks of attention and SwiGLU, and a last norm; the loss applies the head.

  Outputs, with k = 1, 2, ... the block:
    embedded: [B, L, embed_dim].
    block{k}: [B, L, embed_dim]: the sum that ends the block.
    queries{k}: [B, L, num_heads * head_dim], before the rotation.
    keys{k}, values{k}: [B, L, num_kv_heads * head_dim], before the rotation.
    attention{k}: [B, num_heads, L, L]: scores before the softmax, float32, -inf where a query does
      not attend.
    hidden: [B, L, embed_dim]: after the last norm.
    head: (kernel [embed_dim, vocab_size], None, softcap), for `losses.linear_kl` and `head_logits`.
  """

  def __init__(
    self,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp_dim: int | None = None,
    tie_embeddings: bool = False,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    options: DecoderOptions | None = None,
    dtype: Any = None,
    remat: str = "",
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Kernels are normal with deviation 0.02, divided by sqrt(2 num_layers) at the end of a branch
    (GPT-2).

    Args:
      vocab_size: number of tokens in the vocabulary.
      embed_dim: size of the hidden states.
      num_layers: number of blocks.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads, a divisor of num_heads; None: num_heads.
      head_dim: size of a head, even; None: embed_dim / num_heads.
      mlp_dim: size inside SwiGLU; None: 8/3 embed_dim, rounded up to a multiple of 32.
      tie_embeddings: whether the head is the transposed embedding.
      qkv_bias: whether queries, keys and values have biases (Qwen 2).
      qk_norm: whether every query and key head is normalized (Qwen 3).
      options: what no parameter shows: sequence length, rotary positions, epsilon, cap. None: the
        defaults.
      dtype: dtype of the computation and the outputs. Parameters are float32, and norms and softmax
        are computed in it. None: float32.
      remat: policy for what a block stores for the backward pass, see `rematerialized`; empty:
        everything.
      rngs: stream `params`.

    Raises:
      ValueError: heads or sizes that do not divide, or an unknown policy.
    """
    check_policy(remat)
    num_kv_heads = num_kv_heads or num_heads
    self.head_dim = head_dim = _head_dim(embed_dim, num_heads, num_kv_heads, head_dim)
    self.options = options or DecoderOptions()
    self.dtype = dtype or jnp.float32
    self.remat = remat
    normal = nnx.initializers.normal(0.02)
    self.embed = nnx.Embed(vocab_size, embed_dim, embedding_init=normal, rngs=rngs)
    self.blocks = nnx.data(
      [
        Block(
          embed_dim,
          num_layers,
          num_heads=num_heads,
          num_kv_heads=num_kv_heads,
          head_dim=head_dim,
          mlp_dim=mlp_dim or -(-8 * embed_dim // 96) * 32,
          qkv_bias=qkv_bias,
          qk_norm=qk_norm,
          norm_eps=self.options.norm_eps,
          dtype=self.dtype,
          rngs=rngs,
        )
        for _ in range(num_layers)
      ]
    )
    self.norm = rms_norm(embed_dim, self.options.norm_eps, self.dtype, rngs)
    if tie_embeddings:
      self.head = None
    else:
      self.head = nnx.Param(normal(rngs.params(), (embed_dim, vocab_size), jnp.float32))

  def __call__(
    self,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> Outputs:
    """Returns the outputs of tokens.

    Args:
      tokens: int [B, L]; a token outside the vocabulary makes its row's outputs NaN.
      segments: int [B, L], the document of each token of a packed row, each document in one piece.
        Tokens attend only to their own document. None: each row is one document.
      positions: int [B, L], the position of each token in its document; None: counted from the
        segment's start.

    Raises:
      ValueError: no tokens, more than `max_length`, or shapes that differ.
    """
    check_token_rows(tokens, self.options.max_length, segments=segments, positions=positions)
    visible = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    if segments is not None:
      visible = visible & (segments[:, :, None] == segments[:, None, :])
    positions = token_positions(tokens, segments) if positions is None else positions
    x = embed_tokens(self.embed, tokens, self.dtype)
    outputs = {"embedded": x}
    angles = self._rotation(positions)
    for k, block in enumerate(self.blocks, 1):
      x, named, _ = rematerialized(Block.__call__, self.remat)(block, x, angles, visible)
      outputs |= {f"{name}{k}": value for name, value in named.items()} | {f"block{k}": x}
    return {**outputs, "hidden": self.norm(x), "head": self._head()}

  def extend(self, tokens: jax.Array, starts: jax.Array, cache: KVCache) -> tuple[Outputs, KVCache]:
    """Returns the outputs of new tokens, and the cache with their keys and values.

    Args:
      tokens: int [B, N].
      starts: int [B], the position of each row's first new token. The cache must have all earlier
        positions; later ones are overwritten by a later call.
      cache: from `init_cache` or the last call.

    Returns:
      'hidden' [B, N, embed_dim] and 'head', and the new cache.
    """
    new = jnp.arange(tokens.shape[1], dtype=starts.dtype)
    positions = starts[:, None] + new[None]
    cached = jnp.arange(cache.keys[0].shape[1], dtype=starts.dtype)
    visible = cached[None, None] <= positions[:, :, None]
    x = embed_tokens(self.embed, tokens, self.dtype)
    angles = self._rotation(positions)
    new_kv = []
    for block, keys, values in zip(self.blocks, *cache, strict=True):
      x, _, block_kv = block(x, angles, visible, (keys, values, starts))
      new_kv.append(block_kv)
    return {"hidden": self.norm(x), "head": self._head()}, KVCache(*zip(*new_kv))

  def init_cache(self, rows: int, length: int) -> KVCache:
    """Returns an empty cache for `rows` sequences of `length` tokens.

    Raises:
      ValueError: length is above `max_length`.
    """
    if length > self.options.max_length:
      raise ValueError(
        f"length: expected at most max_length={self.options.max_length} positions, got {length}"
      )
    shape = (rows, length, self.blocks[0].num_kv_heads, self.head_dim)
    keys, values = (tuple(jnp.zeros(shape, self.dtype) for _ in self.blocks) for _ in range(2))
    return KVCache(keys, values)

  def _head(self):
    kernel = self.embed.embedding[...].T if self.head is None else self.head[...]
    return kernel.astype(self.dtype), None, self.options.softcap

  def _rotation(self, positions) -> tuple[jax.Array, jax.Array]:
    return rotation(positions, self.head_dim, self.options.rope_theta, self.options.rope_scaling)


def _head_dim(embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
  if num_heads % num_kv_heads:
    raise ValueError(
      f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}"
    )
  if head_dim is None and embed_dim % num_heads:
    raise ValueError(
      f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}; or give head_dim"
    )
  head_dim = head_dim or embed_dim // num_heads
  if head_dim % 2:
    raise ValueError(f"head_dim: expected an even size, as positions rotate pairs, got {head_dim}")
  return head_dim
