"""Names the parameters of an `EncoderDecoder` in released files: T5 and Marian.

Parameters under params/ and entries of a file, without '.weight'. A kernel is the transposed
weight, a norm's scale the weight; 'encoder' may be 'decoder':

    parameter                          T5                           Marian, after 'model.'
    embed                              shared                       shared; decoder.embed_tokens
    source_embed                                                    encoder.embed_tokens
    encoder/norm                       encoder.final_layer_norm
    encoder/buckets                    encoder.block.0.layer.0.SelfAttention.relative_attention_bias
    head                               lm_head                      lm_head, without 'model.'
    head_bias                                                       final_logits_bias, without it

    encoder/blocks/3/                  encoder.block.3.             encoder.layers.3.
    attention_norm                     layer.0.layer_norm           self_attn_layer_norm
    attention/query, key, value        layer.0.SelfAttention.q...   self_attn.q_proj...
    attention/output                   layer.0.SelfAttention.o      self_attn.out_proj
    cross_norm                         layer.1.layer_norm           encoder_attn_layer_norm
    cross/query, ...                   layer.1.EncDecAttention.q    encoder_attn.q_proj
    inner_norm                         layer.2.layer_norm           final_layer_norm
    up, down                           layer.2.DenseReluDense.wi    fc1, fc2
                                       and .wo
    gate, up                           the same, .wi_0 and .wi_1

The perceptron is layer.1 in T5's encoder.
"""

from collections.abc import Callable

import numpy as np

from distill_jax.models.save_weights import Target
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.weights import Origin, torch_kernel

_T5_ATTENTION = {"attention": "layer.0.SelfAttention", "cross": "layer.1.EncDecAttention"}
_T5_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "output": "o"}
_MARIAN_ATTENTION = {"attention": "self_attn", "cross": "encoder_attn"}
_MARIAN_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
_MARIAN_LAYERS = {
  "attention_norm": "self_attn_layer_norm",
  "cross_norm": "encoder_attn_layer_norm",
  "up": "fc1",
  "down": "fc2",
  "inner_norm": "final_layer_norm",
}


def seq2seq_names(
  config: EncoderDecoderConfig, entries: frozenset[str] | None = None
) -> Callable[[str], Origin]:
  """Returns where a released file has a parameter: `names=` of `load_weights`.

  Args:
    config: the network, of the family 't5' or 'marian'.
    entries: names of the file's entries, which may have the shared embeddings as those of the
      encoder or the decoder; None: they have the name that transformers writes.

  >>> config = EncoderDecoderConfig(9, 8, 1, 1, 2, family="marian")
  >>> seq2seq_names(config)("params/decoder/blocks/0/cross_norm/scale")
  'model.decoder.layers.0.encoder_attn_layer_norm.weight'
  """
  entry_of = _t5_entry if config.family == "t5" else _marian_entry

  def name(leaf: str) -> Origin:
    parts = leaf.split("/")[1:]
    entry = entry_of(parts, config)
    if parts[0] == "embed" and not config.source_vocab_size and entries is not None:
      stems = (f"{entry.removesuffix('shared.weight')}{side}" for side in ("encoder", "decoder"))
      spare = [f"{stem}.embed_tokens.weight" for stem in stems]
      entry = next((e for e in (entry, *spare) if e in entries), entry)
    if parts[-1] in ("kernel", "head"):
      return entry, torch_kernel
    return (entry, lambda bias: bias.reshape(-1)) if parts[-1] == "head_bias" else entry

  return name


def written_names(config: EncoderDecoderConfig) -> Callable[[str], Target]:
  """Returns the entries that `save_weights` writes a network's parameters to: the reverse."""
  names = seq2seq_names(config)

  def name(leaf: str) -> Target:
    origin = names(leaf)
    if isinstance(origin, str):
      return origin
    is_bias = leaf.endswith("head_bias")
    return origin[0], (lambda bias: bias[None]) if is_bias else np.transpose

  return name


def _t5_entry(parts: list[str], config: EncoderDecoderConfig) -> str:
  if parts[0] in ("embed", "head"):
    return {"embed": "shared", "head": "lm_head"}[parts[0]] + ".weight"
  side = parts[0]
  if parts[1] == "buckets":
    return f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  if parts[1] == "norm":
    return f"{side}.final_layer_norm.weight"
  _, _, number, layer, *rest = parts
  last = 2 if side == "decoder" else 1
  if layer in _T5_ATTENTION:
    name = f"{_T5_ATTENTION[layer]}.{_T5_PROJECTIONS[rest[0]]}"
  elif layer.endswith("norm"):
    index = {"attention_norm": 0, "cross_norm": 1, "inner_norm": last}[layer]
    name = f"layer.{index}.layer_norm"
  else:
    up = "wi_1" if config.activation == "gated_gelu" else "wi"
    projections = {"gate": "wi_0", "up": up, "down": "wo"}
    name = f"layer.{last}.DenseReluDense.{projections[layer]}"
  return f"{side}.block.{number}.{name}.weight"


def _marian_entry(parts: list[str], config: EncoderDecoderConfig) -> str:
  table = "decoder.embed_tokens" if config.source_vocab_size else "shared"
  outer = {
    "embed": f"model.{table}.weight",
    "source_embed": "model.encoder.embed_tokens.weight",
    "head": "lm_head.weight",
    "head_bias": "final_logits_bias",
  }
  if parts[0] in outer:
    return outer[parts[0]]
  side, _, number, layer, *rest = parts
  if layer in _MARIAN_ATTENTION:
    name = f"{_MARIAN_ATTENTION[layer]}.{_MARIAN_PROJECTIONS[rest[0]]}"
  else:
    name = _MARIAN_LAYERS[layer]
  end = "bias" if parts[-1] == "bias" else "weight"
  return f"model.{side}.layers.{number}.{name}.{end}"
