"""Defines blocks over frames [B, T, embed_dim]; no valid frame depends on padding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.remat import rematerialized
from distill_jax.models.seq2seq.attention import Attention, linear
from distill_jax.models.seq2seq.encoder_decoder_config import RelativePositions
from distill_jax.models.seq2seq.positions import relative_buckets
from distill_jax.models.seq2seq.recurrent import GRU
from distill_jax.models.speech.depthwise import depthwise_conv
from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.zoo.sequence import blank_steps
from distill_jax.types import Outputs

_BRANCHES = 4  # That a Conformer block adds up before its norm.


class FrameStack(nnx.Module):
  """Blocks over frames and the head of a recognizer.

  Its outputs, where k = 1, 2, ... is the block; under jit, those that nothing reads are not
  computed:

  - `block{k}` [B, T, embed_dim]: the output of the block; anything at padding.
  - `attention{k}` [B, num_heads, T, T], of 'conformer': scores before the softmax, float32, -inf
    where a frame does not attend.
  - `logits` [B, T, vocab_size], float32.
  - `lengths` int32 [B]: number of valid frames.
  """

  def __init__(self, config: FrameEncoderConfig, *, dtype: Any, remat: str, rngs: nnx.Rngs):
    is_conformer = config.layer == "conformer"
    kind: Any = ConformerBlock if is_conformer else RecurrentBlock
    self.remat = remat
    self.blocks = nnx.data([kind(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
    # One number for each head and distance, as in T5: lengths that no training row has are read.
    self.relative = RelativePositions()
    if is_conformer:
      table: Any = nnx.Param(jnp.zeros((self.relative.num_buckets, config.num_heads)))
    else:
      table = None
    self.buckets = table
    self.norm = None if is_conformer else _norm(config.embed_dim, dtype, rngs)
    self.head = linear(config.embed_dim, config.vocab_size, dtype=dtype, rngs=rngs, bias=True)

  def __call__(self, x: jax.Array, lengths: jax.Array) -> Outputs:
    """Returns the outputs of frames [B, T, embed_dim], of which `lengths` int32 [B] are valid."""
    run = rematerialized(_apply_block, self.remat)
    valid = jnp.arange(x.shape[1]) < lengths[:, None]
    bias = self._bias(x.shape[1])
    outputs: dict[str, jax.Array] = {}
    for k, block in enumerate(self.blocks, 1):
      x, scores = run(block, x, valid, bias)
      outputs[f"block{k}"] = x
      if scores is not None:
        outputs[f"attention{k}"] = scores
    x = x if self.norm is None else self.norm(x)
    return {**outputs, "logits": self.head(x).astype(jnp.float32), "lengths": lengths}

  def _bias(self, count: int) -> jax.Array | None:
    """Returns what relative positions add to the scores, [1, heads, T, T]."""
    if self.buckets is None:
      return None
    positions = jnp.arange(count)
    buckets = relative_buckets(positions, positions, self.relative, causal=False)
    return self.buckets[...][buckets].transpose(2, 0, 1)[None]


class ConformerBlock(nnx.Module):
  """Half a perceptron, self-attention, a convolution, half a perceptron, and a norm."""

  def __init__(self, config: FrameEncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
    options = {"dtype": dtype, "rngs": rngs}
    width = config.embed_dim
    self.first = Perceptron(config, **options)
    self.attention_norm = _norm(width, dtype, rngs)
    self.attention = Attention(config, depth=_BRANCHES, **options)
    self.conv = ConvModule(config, **options)
    self.second = Perceptron(config, **options)
    self.norm = _norm(width, dtype, rngs)
    self.dropout = _dropout(config, rngs)

  def __call__(self, x, valid, bias):
    """Returns the block's output [B, T, embed_dim] and the attention scores.

    Args:
      x: [B, T, embed_dim].
      valid: bool [B, T], False for padding.
      bias: added to the scores of attention, [1, num_heads, T, T].
    """
    x = x + self.first(x) / 2
    inputs = self.attention_norm(x)
    keys, values = self.attention.keys_values(inputs)
    read, scores = self.attention(inputs, keys, values, valid[:, None, None], bias)
    x = x + self.dropout(read)
    x = x + self.conv(x, valid)
    x = x + self.second(x) / 2
    return self.norm(x), scores


class Perceptron(nnx.Module):
  """Norm, linear, swish, linear: what it adds to its input."""

  def __init__(self, config: FrameEncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
    options = {"dtype": dtype, "rngs": rngs, "bias": True}
    width = config.embed_dim
    self.norm = _norm(width, dtype, rngs)
    self.up = linear(width, config.mlp_dim, **options)
    self.down = linear(config.mlp_dim, width, scale=_BRANCHES**-0.5, **options)
    self.dropout = _dropout(config, rngs)

  def __call__(self, x):
    return self.dropout(self.down(nnx.silu(self.up(self.norm(x)))))


class ConvModule(nnx.Module):
  """Norm, gated linear unit, depthwise convolution, norm, swish, linear.

  The second norm is of each frame, where Gulati et al. normalize by the batch: nothing depends on
  other rows, and training and evaluation are alike.
  """

  def __init__(self, config: FrameEncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
    options = {"dtype": dtype, "rngs": rngs, "bias": True}
    width = config.embed_dim
    size = config.kernel_size
    self.norm = _norm(width, dtype, rngs)
    self.gate = linear(width, 2 * width, **options)
    normal = nnx.initializers.normal(size**-0.5)
    self.kernel = nnx.Param(normal(rngs.params(), (size, width), jnp.float32))
    self.inner_norm = _norm(width, dtype, rngs)
    self.output = linear(width, width, scale=_BRANCHES**-0.5, **options)
    self.dropout = _dropout(config, rngs)

  def __call__(self, x, valid):
    # Padding is 0 to the convolution, as what lies beyond both ends.
    x = blank_steps(nnx.glu(self.gate(self.norm(x))), valid)
    x = depthwise_conv(x, self.kernel[...].astype(x.dtype))
    return self.dropout(self.output(nnx.silu(self.inner_norm(x))))


class RecurrentBlock(nnx.Module):
  """A norm and two gated recurrent networks, one from each end, added to their input."""

  def __init__(self, config: FrameEncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
    width = config.embed_dim
    self.norm = _norm(width, dtype, rngs)
    self.forward = GRU(width, width // 2, dtype=dtype, rngs=rngs)
    self.backward = GRU(width, width // 2, dtype=dtype, rngs=rngs)
    self.dropout = _dropout(config, rngs)

  def __call__(self, x, valid, bias):
    """Returns the block's output [B, T, embed_dim], and None for scores of attention."""
    inputs = self.norm(x)
    forward, _ = self.forward(inputs, None, valid)
    backward, _ = self.backward(inputs, None, valid, reverse=True)
    return x + self.dropout(jnp.concatenate([forward, backward], -1)), None


def _apply_block(block: Any, x, valid, bias):
  return block(x, valid, bias)


def _norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(width, dtype=dtype, rngs=rngs)


def _dropout(config: FrameEncoderConfig, rngs: nnx.Rngs) -> nnx.Dropout:
  return nnx.Dropout(config.dropout, rngs=rngs if config.dropout else None)
