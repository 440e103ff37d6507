"""Tiny encoders in the layout of Hugging Face's `transformers`; imports numpy alone."""

import zlib

import numpy as np

LENGTHS = (7, 4)
TOKENS = np.random.default_rng(7).integers(3, 19, (2, 7))
MASK = np.arange(7) < np.array(LENGTHS)[:, None]
TOKENS[~MASK] = 1  # RoBERTa counts positions by this token.
TOKEN_TYPES = (np.arange(7) >= 3).astype(int) * MASK
SIZES = {
  "vocab_size": 19,
  "hidden_size": 12,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "max_position_embeddings": 16,
}
DISTILBERT = {
  "vocab_size": 19,
  "dim": 12,
  "hidden_dim": 20,
  "n_layers": 2,
  "n_heads": 3,
  "max_position_embeddings": 16,
}
ROBERTA = {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
MODERN = {
  **SIZES,
  "num_hidden_layers": 4,
  "local_attention": 4,
  "pad_token_id": 1,
  "bos_token_id": 0,
  "eos_token_id": 2,
  "cls_token_id": 0,
  "sep_token_id": 2,
}
CASES = {  # class of transformers, arguments of its configuration
  "bert": ("BertModel", SIZES),
  "bert_sequence": ("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
  "bert_tokens": ("BertForTokenClassification", {**SIZES, "num_labels": 5}),
  "bert_spans": ("BertForQuestionAnswering", SIZES),
  "distilbert": ("DistilBertModel", DISTILBERT),
  "distilbert_sequence": (
    "DistilBertForSequenceClassification",
    {**DISTILBERT, "num_labels": 3},
  ),
  "roberta": ("RobertaModel", ROBERTA),
  "modernbert": ("ModernBertModel", MODERN),
  "modernbert_sequence": (
    "ModernBertForSequenceClassification",
    {**MODERN, "num_labels": 3, "classifier_pooling": "mean"},
  ),
  "modernbert_tokens": ("ModernBertForTokenClassification", {**MODERN, "num_labels": 5}),
  "bert_masked": ("BertForMaskedLM", SIZES),
  "distilbert_masked": ("DistilBertForMaskedLM", DISTILBERT),
  "roberta_masked": ("RobertaForMaskedLM", ROBERTA),
  "modernbert_masked": ("ModernBertForMaskedLM", MODERN),
  "roberta_sequence": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 1}),
}


def entry(name: str, shape) -> np.ndarray:
  """Random values of an entry of a file, float32: the same wherever they are asked for."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  is_scale = "norm" in name.lower() and name.endswith("weight")
  return rng.normal(1 if is_scale else 0, 0.3, shape).astype(np.float32)
