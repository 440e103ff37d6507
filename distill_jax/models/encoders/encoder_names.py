"""Names the parameters of an `Encoder` in released files: BERT, DistilBERT, RoBERTa, ModernBERT.

Parameters under params/, and entries of a file, without its prefix ('bert.', 'distilbert.',
'roberta.') and 'encoder.layer.3.' ('transformer.layer.3.'). A kernel is the transposed weight, an
embedding and a norm's scale are the weight:

    parameter                 BERT and RoBERTa                    DistilBERT
    embed                     embeddings.word_embeddings          the same
    positions                 embeddings.position_embeddings      the same
    types                     embeddings.token_type_embeddings
    embed_norm                embeddings.LayerNorm                the same
    blocks/3/query            attention.self.query                attention.q_lin
    blocks/3/key, value       attention.self.key, value           attention.k_lin, v_lin
    blocks/3/output           attention.output.dense              attention.out_lin
    blocks/3/attention_norm   attention.output.LayerNorm          sa_layer_norm
    blocks/3/up               intermediate.dense                  ffn.lin1
    blocks/3/down             output.dense                        ffn.lin2
    blocks/3/inner_norm       output.LayerNorm                    output_layer_norm
    pooler                    pooler.dense                        pre_classifier, without prefix
    head                      classifier, without prefix          the same; of spans: qa_outputs

With the head 'masked', pooler, pooler_norm and head_bias are, without prefix, BERT's
cls.predictions.transform.dense, .transform.LayerNorm and .bias, DistilBERT's vocab_transform,
vocab_layer_norm and vocab_projector.bias, RoBERTa's lm_head.dense, .layer_norm and .bias, and
ModernBERT's head.dense, head.norm and decoder.bias.

With the head 'sequence', RoBERTa's pooler and head are classifier.dense and classifier.out_proj.
Its first two positions belong to padding and are left out. ModernBERT's names are those of
`_MODERN`, with the prefix 'model.'; queries, keys and values are one kernel there.
"""

from collections.abc import Callable

import numpy as np

from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.models.weights import Origin, torch_kernel

_PADDING_POSITIONS = 2
_EMBEDDINGS = {
  "embed": "word_embeddings",
  "positions": "position_embeddings",
  "types": "token_type_embeddings",
  "embed_norm": "LayerNorm",
}
_BERT_BLOCK = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "output": "attention.output.dense",
  "attention_norm": "attention.output.LayerNorm",
  "up": "intermediate.dense",
  "down": "output.dense",
  "inner_norm": "output.LayerNorm",
}
_MODERN = {
  "embed": "embeddings.tok_embeddings",
  "embed_norm": "embeddings.norm",
  "norm": "final_norm",
  "pooler": "head.dense",
  "pooler_norm": "head.norm",
  "head": "classifier",
  "attention_norm": "attn_norm",
  "qkv": "attn.Wqkv",
  "output": "attn.Wo",
  "inner_norm": "mlp_norm",
  "up": "mlp.Wi",
  "down": "mlp.Wo",
}
_MASKED = {  # The entries of pooler, pooler_norm and head_bias.
  "bert": (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
  ),
  "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
  "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
  "modernbert": ("head.dense", "head.norm", "decoder.bias"),
}
_DISTILBERT_BLOCK = {
  "query": "attention.q_lin",
  "key": "attention.k_lin",
  "value": "attention.v_lin",
  "output": "attention.out_lin",
  "attention_norm": "sa_layer_norm",
  "up": "ffn.lin1",
  "down": "ffn.lin2",
  "inner_norm": "output_layer_norm",
}


def encoder_names(config: EncoderConfig, *, prefix: bool) -> Callable[[str], Origin]:
  """Returns where a released file has a parameter of an `Encoder`: `names=` of `load_weights`.

  Args:
    config: the network.
    prefix: whether the names begin with the family's, as in files with a head.

  >>> names = encoder_names(EncoderConfig(9, 8, 1, 2), prefix=True)
  >>> names("params/blocks/0/up/bias")
  'bert.encoder.layer.0.intermediate.dense.bias'
  """

  def name(leaf: str) -> Origin:
    entry = _entry(leaf.split("/")[1:], config, family_prefix(config) if prefix else "")
    if leaf.endswith("/kernel"):
      return entry, torch_kernel
    if leaf == "params/positions/embedding" and config.family == "roberta":
      return entry, lambda table: table[_PADDING_POSITIONS:]
    return entry

  return name


def family_prefix(config: EncoderConfig) -> str:
  """Returns what the names of an encoder begin with in a file that also has a head."""
  return "model." if config.family == "modernbert" else f"{config.family}."


def released_names(config: EncoderConfig) -> Callable[[str], Origin]:
  """Returns the entries that `save_weights` writes a network's parameters to: the reverse."""
  names = encoder_names(config, prefix=bool(config.head))

  def name(leaf: str) -> Origin:
    origin = names(leaf)
    entry = origin if isinstance(origin, str) else origin[0]
    if leaf.endswith("/kernel"):
      return entry, np.transpose
    if leaf == "params/positions/embedding" and config.family == "roberta":
      return entry, lambda table: np.pad(table, ((_PADDING_POSITIONS, 0), (0, 0)))
    return entry

  return name


def _entry(parts: list[str], config: EncoderConfig, prefix: str) -> str:
  if parts == ["head_bias"]:
    return _MASKED[config.family][2]
  layer, leaf = parts[-2:]
  end = "bias" if leaf == "bias" else "weight"
  if config.head == "masked" and layer in ("pooler", "pooler_norm"):
    return f"{_MASKED[config.family][layer == 'pooler_norm']}.{end}"
  if config.family == "modernbert":
    return f"{_modern(parts, prefix)}.{end}"
  if layer == "pooler":
    return f"{_pooler(config, prefix)}.{end}"
  if layer == "head":
    return f"{_head(config)}.{end}"
  if parts[0] != "blocks":
    return f"{prefix}embeddings.{_EMBEDDINGS[layer]}.{end}"
  if config.family == "distilbert":
    return f"{prefix}transformer.layer.{parts[1]}.{_DISTILBERT_BLOCK[layer]}.{end}"
  return f"{prefix}encoder.layer.{parts[1]}.{_BERT_BLOCK[layer]}.{end}"


def _modern(parts: list[str], prefix: str) -> str:
  layer = _MODERN[parts[-2]]
  if parts[0] == "blocks":
    return f"{prefix}layers.{parts[1]}.{layer}"
  return layer if parts[0] in ("pooler", "pooler_norm", "head") else prefix + layer


def _pooler(config: EncoderConfig, prefix: str) -> str:
  if config.family == "distilbert":
    return "pre_classifier"
  if config.family == "roberta" and config.head == "sequence":
    return "classifier.dense"
  return f"{prefix}pooler.dense"


def _head(config: EncoderConfig) -> str:
  if config.head == "spans":
    return "qa_outputs"
  if config.family == "roberta" and config.head == "sequence":
    return "classifier.out_proj"
  return "classifier"
