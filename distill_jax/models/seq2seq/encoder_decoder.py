"""Defines encoder-decoder Transformers (Vaswani et al. 2017), which output hidden states.

    config = EncoderDecoderConfig(2000, 128, encoder_layers=6, decoder_layers=2, num_heads=4)
    student = from_nnx(
      lambda rngs: EncoderDecoder(config, rngs=rngs),
      inputs=("source", "source_segments", "tokens"),
    )

The objectives of language models take it as it is: `objectives.tokens` compares 'hidden' and 'head'
at every token of the target.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.llm.token_rows import check_token_rows, embed_tokens
from distill_jax.models.remat import check_policy
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.seq2seq.positions import sinusoids
from distill_jax.models.seq2seq.stack import Stack
from distill_jax.types import Outputs

INPUTS = ("source", "source_segments", "tokens")
"""The entries of a batch that an `EncoderDecoder` reads, in order."""


class EncoderDecoder(nnx.Module):
  """An encoder of the source, and a causal decoder that attends to it; the loss applies the head.

  Its outputs, where k = 1, 2, ... is the block; under jit, those that nothing reads are not
  computed:

  - `encoder_block{k}` [B, S, embed_dim]: the output of the encoder's block.
  - `encoder_attention{k}` [B, num_heads, S, S]: scores before the softmax, float32, -inf where a
    query does not attend.
  - `encoded` [B, S, embed_dim]: the encoder's output, after its last norm.
  - `block{k}` [B, T, embed_dim]: the output of the decoder's block.
  - `attention{k}` [B, num_heads, T, T], `cross_attention{k}` [B, num_heads, T, S]: the decoder's
    scores, to the target and to the source.
  - `hidden` [B, T, embed_dim]: the decoder's output, after its last norm.
  - `head`: (kernel [embed_dim, vocab_size], bias or None, None), for `losses.linear_kl` and
    `head_logits`.

  >>> config = EncoderDecoderConfig(100, 16, encoder_layers=2, decoder_layers=1, num_heads=2)
  >>> network = EncoderDecoder(config, rngs=nnx.Rngs(0))
  >>> source = jnp.ones((3, 8), int)
  >>> outputs = network(source, source - 1, jnp.ones((3, 5), int))
  >>> outputs["hidden"].shape, outputs["cross_attention1"].shape
  ((3, 5, 16), (3, 2, 5, 8))
  """

  def __init__(
    self, config: EncoderDecoderConfig, *, dtype: Any = None, remat: str = "", rngs: nnx.Rngs
  ):
    """Builds the layers; what enters a block, and what a branch adds up to, starts with variance 1.

    Args:
      config: sizes and family.
      dtype: dtype of the computation and the outputs. Parameters are float32, and norms and softmax
        are computed in it. None: float32.
      remat: policy for what a block stores for the backward pass, see `rematerialized`; empty:
        everything.
      rngs: stream `params`.

    Raises:
      ValueError: an unknown policy.
    """
    check_policy(remat)
    self.config = config
    self.dtype = dtype or jnp.float32
    width = config.embed_dim
    self.embed = self._embedding(config.vocab_size, rngs)
    is_shared = not config.source_vocab_size
    self.source_embed = None if is_shared else self._embedding(config.source_vocab_size, rngs)
    options = {"dtype": self.dtype, "remat": remat, "rngs": rngs}
    self.encoder = Stack(config, decoder=False, **options)
    self.decoder = Stack(config, decoder=True, **options)
    normal = nnx.initializers.normal(width**-0.5)
    if config.tie_embeddings:
      self.head = None
    else:
      self.head = nnx.Param(normal(rngs.params(), (width, config.vocab_size), jnp.float32))
    has_bias = config.layout.head_bias
    self.head_bias = nnx.Param(jnp.zeros(config.vocab_size)) if has_bias else None

  def __call__(
    self, source: jax.Array, source_segments: jax.Array | None, tokens: jax.Array
  ) -> Outputs:
    """Returns the outputs of pairs of a source and a target.

    Args:
      source: int [B, S], the encoder's tokens; one outside the vocabulary makes its row's outputs
        NaN.
      source_segments: int [B, S], 0 for text and negative for padding. None: there is no padding. A
        decoder whose source is empty reads the mean of the padding.
      tokens: int [B, T], the decoder's inputs: the start token and the target without its end.
        Tokens attend to earlier ones only, so that padding that follows changes nothing. Padding is
        any token of the vocabulary; others, such as -100, make their row NaN.

    Raises:
      ValueError: no tokens, more than `max_length`, or shapes that differ.
    """
    outputs = self.encode(source, source_segments)
    return {**outputs, **self.decode(tokens, outputs["encoded"], source_segments)}

  def encode(self, source: jax.Array, source_segments: jax.Array | None) -> Outputs:
    """Returns the encoder's outputs; arguments and errors as in `__call__`."""
    max_length = self.config.max_length
    check_token_rows(source, max_length, field="source", source_segments=source_segments)
    embed = self.embed if self.source_embed is None else self.source_embed
    x = self._embed(embed, source)
    x, named = self.encoder(x, source_visible(source_segments))
    return {f"encoder_{name}": value for name, value in named.items()} | {"encoded": x}

  def decode(
    self, tokens: jax.Array, encoded: jax.Array, source_segments: jax.Array | None
  ) -> Outputs:
    """Returns the decoder's outputs for a source that is encoded, [B, S, embed_dim]."""
    check_token_rows(tokens, self.config.max_length)
    visible = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    x = self._embed(self.embed, tokens)
    x, named = self.decoder(x, visible, encoded, source_visible(source_segments))
    return {**named, "hidden": x, "head": self.logits_head()}

  def embed_target(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
    """Returns what enters the decoder for tokens [B, 1] at `position`, an int scalar."""
    return self._embed(self.embed, tokens, position)

  def logits_head(self) -> tuple[jax.Array, jax.Array | None, None]:
    """Returns the output 'head'."""
    bias = None if self.head_bias is None else self.head_bias[...]
    if self.head is not None:
      return self.head[...].astype(self.dtype), bias, None
    scale = self.config.embed_dim**-0.5 if self.config.layout.head_scale else 1.0
    return (self.embed.embedding[...].T * scale).astype(self.dtype), bias, None

  def _embedding(self, count: int, rngs: nnx.Rngs) -> nnx.Embed:
    deviation = self.config.embed_dim**-0.5 if self.config.layout.embed_scale else 1.0
    normal = nnx.initializers.normal(deviation)
    return nnx.Embed(count, self.config.embed_dim, embedding_init=normal, rngs=rngs)

  def _embed(
    self, embed: nnx.Embed, tokens: jax.Array, position: jax.Array | None = None
  ) -> jax.Array:
    """Returns what enters a stack for tokens [B, L], from the first on, or [B, 1] at a position."""
    layout = self.config.layout
    width = self.config.embed_dim
    x = embed_tokens(embed, tokens, self.dtype)
    if layout.embed_scale:
      x = x * width**0.5
    if layout.positions != "sinusoidal":
      return x
    if position is None:
      return x + jnp.asarray(sinusoids(tokens.shape[1], width), self.dtype)
    return x + jnp.asarray(sinusoids(self.config.max_length, width), self.dtype)[position]


def source_visible(segments: jax.Array | None) -> jax.Array | None:
  """Returns where queries attend to a source, bool [B, 1, 1, S]; None: everywhere."""
  return None if segments is None else (segments >= 0)[:, None, None]
