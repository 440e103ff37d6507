"""A tiny Whisper in the layout of Hugging Face's `transformers`; imports numpy alone."""

import zlib

import numpy as np

CONFIG = {
  "vocab_size": 19,
  "num_mel_bins": 5,
  "d_model": 12,
  "encoder_layers": 2,
  "decoder_layers": 2,
  "encoder_attention_heads": 3,
  "decoder_attention_heads": 3,
  "encoder_ffn_dim": 20,
  "decoder_ffn_dim": 20,
  "max_source_positions": 8,
  "max_target_positions": 10,
  "decoder_start_token_id": 17,
  "bos_token_id": 18,
  "eos_token_id": 18,
  "pad_token_id": 18,
  "dropout": 0.0,
}
GENERATION = {
  "suppress_tokens": [4, 5, 6, 7, 12, 16],
  "begin_suppress_tokens": [9, 18, 3],
  "decoder_start_token_id": 17,
  "eos_token_id": 18,
  "pad_token_id": 18,
}
FEATURES = np.random.default_rng(7).normal(size=(2, 16, 5)).astype(np.float32)
TOKENS = np.random.default_rng(8).integers(0, 17, (2, 6))
TOKENS[:, :2] = PROMPT = 3, 4


def entry(name: str, shape) -> np.ndarray:
  """Random values of an entry of a file, float32: the same wherever they are asked for."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  is_scale = "norm" in name and name.endswith("weight")
  return rng.normal(1 if is_scale else 0, 0.3, shape).astype(np.float32)
