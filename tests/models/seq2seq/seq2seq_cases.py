"""Tiny encoder-decoders in the layout of Hugging Face's `transformers`; imports numpy alone."""

import zlib

import numpy as np

SOURCE_LENGTHS = (7, 4, 6)
SOURCE = np.random.default_rng(7).integers(3, 17, (3, 7))
MASK = np.arange(7) < np.array(SOURCE_LENGTHS)[:, None]
SOURCE[~MASK] = 0
TOKENS = np.random.default_rng(8).integers(3, 17, (3, 6))
MAX_NEW_TOKENS = 6
NUM_BEAMS = 4
T5 = {
  "vocab_size": 19,
  "d_model": 12,
  "d_kv": 5,
  "d_ff": 20,
  "num_layers": 2,
  "num_decoder_layers": 2,
  "num_heads": 3,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 6,
  "decoder_start_token_id": 0,
  "eos_token_id": 9,  # One that beams reach at several lengths.
  "dropout_rate": 0.0,
}
MARIAN = {
  "vocab_size": 19,
  "d_model": 12,
  "encoder_ffn_dim": 20,
  "decoder_ffn_dim": 20,
  "encoder_layers": 2,
  "decoder_layers": 2,
  "encoder_attention_heads": 3,
  "decoder_attention_heads": 3,
  "max_position_embeddings": 16,
  "scale_embedding": True,
  "activation_function": "swish",
  "decoder_start_token_id": 18,
  "pad_token_id": 18,
  "eos_token_id": 5,
  "dropout": 0.0,
}
_TARGET_SIZE = 17
CASES = {  # class of transformers, arguments of its configuration
  "t5": ("T5ForConditionalGeneration", T5),
  "t5_v1_1": (
    "T5ForConditionalGeneration",
    {**T5, "eos_token_id": 14, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
  ),
  "marian": ("MarianMTModel", MARIAN),
  "marian_two_vocabularies": (
    "MarianMTModel",
    {
      **MARIAN,
      "decoder_vocab_size": _TARGET_SIZE,
      "share_encoder_decoder_embeddings": False,
      "tie_word_embeddings": False,
      "decoder_start_token_id": _TARGET_SIZE - 1,
      "pad_token_id": _TARGET_SIZE - 1,
      "activation_function": "gelu",
    },
  ),
}


def entry(name: str, shape) -> np.ndarray:
  """Random values of an entry of a file, float32: the same wherever they are asked for."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  is_scale = "norm" in name.lower() and name.endswith("weight")
  return rng.normal(1 if is_scale else 0, 0.3, shape).astype(np.float32)
