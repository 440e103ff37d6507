"""Decoder-only transformers of the Llama and Qwen kind: language models that hand out hidden states, not logits.

    student = from_nnx(
      lambda rngs: Decoder(256, 128, 4, 4, rngs=rngs), inputs=("tokens", "segments", "positions")
    )

RMSNorm (Zhang & Sennrich 2019) before each part, rotary positions (Su et al. 2021), grouped queries (Ainslie et al.
2023), SwiGLU (Shazeer 2020), as in LLaMA (Touvron et al. 2023). Released checkpoints come in with decoder_weights.py,
text comes out with sampling.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.remat import check_policy, rematerialized
from distill_jax.types import Model, Outputs


class RopeScaling(NamedTuple):
  """Llama 3.1's stretched rotary positions; fields as in a released config.json."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


class Cache(NamedTuple):
  """Keys (rotated) and values at the positions seen, of every block [B, S, kv_heads, head_width]."""

  keys: tuple[jax.Array, ...]  # an array a block: of one for all, each token would copy all
  values: tuple[jax.Array, ...]


class Decoder(nnx.Module):
  """Embedding, blocks of attention and SwiGLU, a last norm; the head is applied by the loss.

  Outputs, with k = 1, 2, ... the block:
    embedded: [B, L, width].
    block{k}: [B, L, width]: the sum that ends the block.
    queries{k}, keys{k}, values{k}: [B, L, heads (kv_heads) * head_width], before the rotation.
    attention{k}: [B, heads, L, L]: scores before the softmax, float32, -inf where a query does not look.
    hidden: [B, L, width]: after the last norm.
    head: (kernel [width, vocabulary], None, softcap), for `losses.linear_kl` and `logits`.
  """

  def __init__(
    self,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_width: int | None = None,
    inner: int | None = None,
    length: int = 2048,
    tied: bool = False,
    projection_bias: bool = False,
    projection_norm: bool = False,
    rope_base: float = 10_000.0,
    rope_scaling: RopeScaling | None = None,
    epsilon: float = 1e-6,
    softcap: float | None = None,
    dtype=None,
    remat: str = "",
    rngs: nnx.Rngs,
  ):
    """Build the layers: kernels normal with deviation 0.02, those that end a branch over sqrt(2 depth) (GPT-2).

    Args:
      vocabulary: number of tokens.
      width: of the hidden states.
      depth: number of blocks.
      heads: of the queries.
      kv_heads: of keys and values, a divisor of heads; None: heads.
      head_width: even; None: width / heads.
      inner: width inside SwiGLU; None: 8/3 width, rounded up to a multiple of 32.
      length: the most tokens of a sequence.
      tied: the head is the embedding, transposed.
      projection_bias: of queries, keys and values (Qwen 2).
      projection_norm: RMSNorm of every query and key head (Qwen 3).
      rope_base: of the rotary wavelengths.
      rope_scaling: for models trained on shorter sequences first (Llama 3.1).
      epsilon: of the norms.
      softcap: of the logits, handed out with the head.
      dtype: of the computation and the outputs; parameters are float32, norms and softmax are computed in it. None:
        float32.
      remat: what a block keeps for the backward pass, see `rematerialized`; empty: all that it needs.
      rngs: stream `params`.

    Raises:
      ValueError: widths or heads that do not divide, or an unknown policy.
    """
    check_policy(remat)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
      raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}")
    if head_width is None and width % heads:
      raise ValueError(f"heads={heads} must divide width={width}, or give head_width")
    head_width = head_width or width // heads
    if head_width % 2:
      raise ValueError(f"head_width={head_width} must be even: positions rotate pairs")
    inner = inner or -(-8 * width // 96) * 32
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width, "inner": inner}
    options = {
      "projection_bias": projection_bias,
      "projection_norm": projection_norm,
      "epsilon": epsilon,
    }
    self.length, self.softcap, self.dtype, self.remat = length, softcap, dtype or jnp.float32, remat
    self.wavelengths = rope_base, rope_scaling, head_width
    normal = nnx.initializers.normal(0.02)
    self.embed = nnx.Embed(vocabulary, width, embedding_init=normal, rngs=rngs)
    self.blocks = nnx.List(
      _Block(width, depth, **sizes, **options, dtype=self.dtype, rngs=rngs) for _ in range(depth)
    )
    self.norm = _norm(width, epsilon, self.dtype, rngs)
    self.head = None if tied else nnx.Param(normal(rngs.params(), (width, vocabulary), jnp.float32))

  def __call__(self, tokens: jax.Array, segments=None, positions=None) -> Outputs:
    """Outputs of tokens.

    Args:
      tokens: int [B, L]; one outside the vocabulary makes its row's outputs NaN.
      segments: int [B, L], the document of each token of a packed row (documents lie in one piece each): tokens look
        at their own alone. None: each row is one.
      positions: int [B, L] of each token in its document; None: counted from where its segment begins.

    Raises:
      ValueError: no tokens, more than `length`, or shapes that differ.
    """
    if tokens.ndim != 2 or not tokens.size:
      raise ValueError(f"tokens {tokens.shape} must be [rows, length], not empty")
    if tokens.shape[1] > self.length:
      raise ValueError(f"tokens {tokens.shape} are longer than the model's length={self.length}")
    for name, value in (("segments", segments), ("positions", positions)):
      if value is not None and value.shape != tokens.shape:
        raise ValueError(f"{name} {value.shape} must have the shape of tokens {tokens.shape}")
    visible = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    if segments is not None:
      visible = visible & (segments[:, :, None] == segments[:, None, :])
    positions = _positions(tokens, segments) if positions is None else positions
    x = self._embedded(tokens)
    outputs, rotation = {"embedded": x}, self._rotation(positions)
    for k, block in enumerate(self.blocks, 1):
      x, named, _ = rematerialized(_Block.__call__, self.remat)(block, x, rotation, visible)
      outputs |= {f"{name}{k}": value for name, value in named.items()} | {f"block{k}": x}
    return {**outputs, "hidden": self.norm(x), "head": self._head()}

  def extend(self, tokens: jax.Array, starts: jax.Array, cache: Cache) -> tuple[Outputs, Cache]:
    """Outputs of new tokens, whose keys and values join those in the cache.

    Args:
      tokens: int [B, N].
      starts: int [B]: the position of each row's first new token. Earlier positions must be in the cache; later ones
        are overwritten when they come.
      cache: from `empty_cache` or the last call.

    Returns:
      'hidden' [B, N, width] and 'head', and the cache.
    """
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    visible = jnp.arange(cache.keys[0].shape[1]) <= positions[:, :, None]
    x, rotation, new = self._embedded(tokens), self._rotation(positions), []
    for i, block in enumerate(self.blocks):
      x, _, kept = block(x, rotation, visible, (cache.keys[i], cache.values[i], starts))
      new.append(kept)
    keys, values = zip(*new)
    return {"hidden": self.norm(x), "head": self._head()}, Cache(keys, values)

  def empty_cache(self, rows: int, length: int) -> Cache:
    """For `length` positions. Raises ValueError where the model has fewer."""
    if length > self.length:
      raise ValueError(
        f"a cache of {length} positions is longer than the model's length={self.length}"
      )
    attention = self.blocks[0]
    shape = (rows, length, attention.kv_heads, attention.head_width)
    keys, values = (tuple(jnp.zeros(shape, self.dtype) for _ in self.blocks) for _ in range(2))
    return Cache(keys, values)

  def _embedded(self, tokens):
    vocabulary = self.embed.num_embeddings
    tokens = jnp.where(tokens < 0, vocabulary, tokens)  # a negative one would count from the end
    return (
      self.embed.embedding[...].astype(self.dtype).at[tokens].get(mode="fill", fill_value=jnp.nan)
    )

  def _head(self):
    kernel = self.embed.embedding[...].T if self.head is None else self.head[...]
    return kernel.astype(self.dtype), None, self.softcap

  def _rotation(self, positions) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every pair's angle, float32 [B, L, 1, head_width / 2]."""
    base, scaling, head_width = self.wavelengths
    frequencies = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    if scaling is not None:
      frequencies = _stretched(frequencies, scaling)
    angles = positions[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


class _Block(nnx.Module):
  """Attention and SwiGLU, each on a normalized input and added to it."""

  def __init__(
    self,
    width,
    depth,
    *,
    heads,
    kv_heads,
    head_width,
    inner,
    projection_bias,
    projection_norm,
    epsilon,
    dtype,
    rngs,
  ):
    def linear(inputs, outputs, *, bias=False, scale=1.0):
      normal = nnx.initializers.normal(0.02 * scale)
      return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=normal, dtype=dtype, rngs=rngs)

    last = (2 * depth) ** -0.5
    self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
    self.attention_norm = _norm(width, epsilon, dtype, rngs)
    self.query = linear(width, heads * head_width, bias=projection_bias)
    self.key = linear(width, kv_heads * head_width, bias=projection_bias)
    self.value = linear(width, kv_heads * head_width, bias=projection_bias)
    self.query_norm = _norm(head_width, epsilon, dtype, rngs) if projection_norm else None
    self.key_norm = _norm(head_width, epsilon, dtype, rngs) if projection_norm else None
    self.output = linear(heads * head_width, width, scale=last)
    self.inner_norm = _norm(width, epsilon, dtype, rngs)
    self.gate, self.up = linear(width, inner), linear(width, inner)
    self.down = linear(inner, width, scale=last)

  def __call__(self, x, rotation, visible, cache=None):
    """x [B, L, width], where every query looks [B or 1, L, S] -> the same shape, what is named, keys and values.

    cache: (keys, values, starts) of S positions, to be written to and read; without it S = L.
    """
    normed = self.attention_norm(x)
    flat = {"queries": self.query(normed), "keys": self.key(normed), "values": self.value(normed)}
    q, k, v = (part.reshape(*x.shape[:2], -1, self.head_width) for part in flat.values())
    if self.query_norm is not None and self.key_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    q, k = _rotated(q, rotation), _rotated(k, rotation)
    if cache is not None:
      k, v = (jax.vmap(_write)(old, new, cache[2]) for old, new in zip(cache, (k, v)))
    grouped = q.reshape(*q.shape[:2], self.kv_heads, -1, self.head_width)
    scores = jnp.einsum("blkgd,bskd->bkgls", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * self.head_width**-0.5, -jnp.inf)
    shares = jax.nn.softmax(scores).astype(x.dtype)
    x = x + self.output(jnp.einsum("bkgls,bskd->blkgd", shares, v).reshape(*x.shape[:2], -1))
    normed = self.inner_norm(x)
    x = x + self.down(nnx.silu(self.gate(normed)) * self.up(normed))
    named = {**flat, "attention": scores.reshape(scores.shape[0], self.heads, *scores.shape[3:])}
    return x, named, (k, v)


def logits(outputs: Outputs) -> jax.Array:
  """hidden @ kernel + bias, capped: float32 [..., vocabulary]. For a few tokens; losses take the parts."""
  kernel, bias, softcap = outputs["head"]
  z = jnp.matmul(outputs["hidden"], kernel, preferred_element_type=jnp.float32)
  z = z if bias is None else z + bias
  return z if softcap is None else softcap * jnp.tanh(z / softcap)


def with_vocabulary(model: Model, size: int) -> Model:
  """A language model whose head is wider than its tokenizer: tokens from `size` on have probability 0, everywhere.

  Raises (in apply):
    ValueError: the head has fewer tokens, or caps its logits, which would bring them back.
  """

  def apply(params, state, batch, *, train, key):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    kernel, bias, softcap = outputs["head"]
    if not 1 <= size <= kernel.shape[1]:
      raise ValueError(f"size: expected 1 to {kernel.shape[1]}, the width of the head, got {size}")
    if softcap is not None:
      raise ValueError(
        "with_vocabulary: a head that caps its logits cannot leave tokens out by its bias"
      )
    bias = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    return {
      **outputs,
      "head": (kernel, jnp.where(jnp.arange(len(bias)) < size, bias, -jnp.inf), None),
    }, state

  return model._replace(apply=apply)


def with_logits(model: Model) -> Model:
  """A language model that gives 'logits' [B, L, vocabulary] alone, as a program that is handed on does."""

  def apply(params, state, batch, *, train, key):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    return {"logits": logits(outputs)}, state

  return model._replace(apply=apply)


def _norm(width, epsilon, dtype, rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


def _rotated(x, rotation):
  """Pairs are (i, i + half), as in released checkpoints."""
  cos, sin = rotation
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _positions(tokens, segments):
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  if segments is None:
    return places
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def _stretched(frequencies, scaling: RopeScaling):
  """Long wavelengths times the factor, short ones as they were, those between in between (Llama 3.1's code)."""
  turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  share = jnp.clip((turns - low) / (high - low), 0, 1)
  return (1 - share) * frequencies / scaling.factor + share * frequencies


def _write(old: Any, new: Any, start: Any):
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 0)
