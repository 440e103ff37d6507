"""Defines encoders of text, BERT (Devlin et al. 2019) and its kin, with heads for texts and tokens.

    config = EncoderConfig(tokenizer.size, 128, 2, 4, head="sequence", num_labels=3)
    student = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs=("tokens", "segments"))

encoder_files.py reads and writes released checkpoints.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.encoders.encoder_block import EncoderBlock, layer_norm, linear
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.models.encoders.rotary_block import RotaryBlock, rotary_inputs
from distill_jax.models.llm.token_rows import (
  check_token_rows,
  embed_tokens,
  mean_of_tokens,
  token_positions,
)
from distill_jax.models.remat import check_policy, rematerialized
from distill_jax.types import Outputs


class Encoder(nnx.Module):
  """Embeddings of tokens, positions and token types, blocks that attend to both sides, and a head.

  Its outputs, where k = 1, 2, ... is the block; under jit, those that nothing reads are not
  computed:

  - `embedded` [B, L, embed_dim]: the normalized sum of the embeddings.
  - `block{k}` [B, L, embed_dim]: the output of the block.
  - `queries{k}`, `keys{k}`, `values{k}` [B, L, embed_dim]: the heads one after the other, before a
    rotation.
  - `attention{k}` [B, num_heads, L, L]: scores before the softmax, float32, -inf where a query does
    not attend.
  - `hidden` [B, L, embed_dim]: the output of the last block, in ModernBERT after a last norm.
  - `embedding` [B, embed_dim]: the mean of `hidden` over the tokens, as sentence embeddings have
    it. It is not normalized. A row without tokens gives NaN.
  - `pooled` [B, embed_dim]: the pooler's output, which the head 'sequence' reads; in ModernBERT all
    heads do, and with those of tokens, or 'masked', it is [B, L, embed_dim].
  - `logits`: [B, num_labels] for the head 'sequence', [B, L, num_labels] for 'tokens', [B, L,
    vocab_size] for 'masked'.
  - `start`, `end` [B, L]: for 'spans', logits over the positions, -inf for padding.

  >>> config = EncoderConfig(100, 16, num_layers=2, num_heads=2, head="tokens", num_labels=5)
  >>> encoder = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))
  >>> tokens = jax.ShapeDtypeStruct((3, 8), jnp.int32)
  >>> outputs = nnx.eval_shape(lambda encoder, tokens: encoder(tokens), encoder, tokens)
  >>> outputs["logits"].shape, outputs["attention2"].shape
  ((3, 8, 5), (3, 2, 8, 8))
  """

  def __init__(self, config: EncoderConfig, *, dtype: Any = None, remat: str = "", rngs: nnx.Rngs):
    """Builds the layers; kernels and embeddings are normal with deviation 0.02, biases 0.

    Args:
      config: sizes and head.
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
    self.remat = remat
    width = config.embed_dim

    def embedding(count):
      normal = nnx.initializers.normal(0.02)
      return nnx.Embed(count, width, embedding_init=normal, dtype=self.dtype, rngs=rngs)

    self.embed = embedding(config.vocab_size)
    is_modern = config.modern is not None
    self.positions = None if is_modern else embedding(config.max_length)
    self.types = embedding(config.token_types) if config.token_types else None
    self.embed_norm = layer_norm(config, self.dtype, rngs)
    self.blocks = nnx.data([self._block(k, rngs) for k in range(config.num_layers)])
    self.norm = layer_norm(config, self.dtype, rngs) if is_modern else None
    has_bias = not is_modern
    self.pooler = linear(width, width, self.dtype, rngs, bias=has_bias) if config.pooler else None
    is_masked = config.head == "masked"
    has_norm = config.pooler and (is_modern or is_masked)
    self.pooler_norm = layer_norm(config, self.dtype, rngs) if has_norm else None
    has_kernel = config.head and not is_masked
    self.head = linear(width, config.num_labels, self.dtype, rngs) if has_kernel else None
    self.head_bias = nnx.Param(jnp.zeros(config.vocab_size)) if is_masked else None

  def __call__(
    self,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    token_types: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> Outputs:
    """Returns the outputs of tokens.

    Args:
      tokens: int [B, L]; a token outside the vocabulary makes its row's outputs NaN.
      segments: int [B, L], the text of each token, negative for padding: `mask - 1` for a row of
        one text. Tokens attend only to their own text. None: there is no padding.
      token_types: int [B, L], 0 and 1 for the sentences of a pair; None: 0.
      positions: int [B, L], the position of each token in its text; None: counted from the
        segment's start.

    Raises:
      ValueError: no tokens, more than `max_length`, token types that the network does not have, or
        shapes that differ.
    """
    check_token_rows(
      tokens,
      self.config.max_length,
      segments=segments,
      token_types=token_types,
      positions=positions,
    )
    visible = None
    if segments is not None:
      visible = segments[:, :, None] == segments[:, None, :]
    positions = token_positions(tokens, segments) if positions is None else positions
    x = self._embed(tokens, token_types, positions)
    outputs = {"embedded": x}
    inputs = self._inputs_of_blocks(visible, positions)
    for k, (block, arrays) in enumerate(zip(self.blocks, inputs, strict=True), 1):
      x, named = rematerialized(type(block).__call__, self.remat)(block, x, *arrays)
      outputs |= {f"{name}{k}": value for name, value in named.items()} | {f"block{k}": x}
    x = x if self.norm is None else self.norm(x)
    outputs |= {"hidden": x, "embedding": mean_of_tokens(x, segments)}
    return outputs | self._head(x, outputs["embedding"], segments)

  def _block(self, index: int, rngs: nnx.Rngs) -> nnx.Module:
    if self.config.modern is None:
      return EncoderBlock(self.config, dtype=self.dtype, rngs=rngs)
    return RotaryBlock(self.config, first=index == 0, dtype=self.dtype, rngs=rngs)

  def _inputs_of_blocks(self, visible, positions) -> list:
    """Returns what each block reads next to the hidden states."""
    if self.config.modern is None:
      return [(visible,)] * self.config.num_layers
    return rotary_inputs(self.config, self.config.modern, visible, positions)

  def _embed(self, tokens, token_types, positions):
    x = embed_tokens(self.embed, tokens, self.dtype)
    if self.positions is not None:
      x = x + embed_tokens(self.positions, positions, self.dtype)
    if self.types is not None:
      token_types = jnp.zeros_like(tokens) if token_types is None else token_types
      x = x + embed_tokens(self.types, token_types, self.dtype)
    elif token_types is not None:
      raise ValueError("token_types: expected None, as the network has no embeddings of them")
    return self.embed_norm(x)

  def _head(self, hidden, embedding, segments) -> dict[str, jax.Array]:
    """Returns 'pooled' and 'logits', as far as the network has them."""
    modern = self.config.modern
    is_sequence = self.config.head == "sequence"
    outputs = {}
    if self.pooler is not None:
      reads_all = self.head_bias is not None or (modern is not None and not is_sequence)
      inputs = hidden if reads_all else hidden[:, 0]
      if is_sequence and modern is not None and modern.mean_pooling:
        inputs = embedding
      outputs["pooled"] = self._activate(self.pooler(inputs))
    if self.head_bias is not None:
      bias = self.head_bias[...].astype(self.dtype)
      return outputs | {"logits": self.embed.attend(outputs["pooled"]) + bias}
    if self.head is None:
      return outputs
    logits = self.head(outputs["pooled"] if is_sequence or modern is not None else hidden)
    if self.config.head != "spans":
      return outputs | {"logits": logits}
    if segments is not None:
      logits = jnp.where(segments[..., None] >= 0, logits, -jnp.inf)
    return outputs | {"start": logits[..., 0], "end": logits[..., 1]}

  def _activate(self, x):
    """Returns the pooler's output from what its kernel gives."""
    if self.pooler_norm is not None:
      return self.pooler_norm(jax.nn.gelu(x, approximate=False))
    return nnx.relu(x) if self.config.family == "distilbert" else jnp.tanh(x)
