"""Tiny checkpoints in the layout of Hugging Face's `transformers`; imports numpy alone."""

import numpy as np

TOKENS = np.random.default_rng(7).integers(0, 17, (2, 24))
SIZES = {
  "vocab_size": 17,
  "hidden_size": 12,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
}
STRETCHED = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
FAMILIES = {  # arguments of the configurations of transformers
  "llama": {**SIZES, "head_dim": 6, "tie_word_embeddings": False, "rope_parameters": STRETCHED},
  "qwen2": {
    **SIZES,
    "hidden_size": 16,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
  },
  "qwen3": {
    **SIZES,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
  },
}


def weights(family: str) -> dict[str, np.ndarray]:
  """Random entries of a file, in float32: the same wherever it is asked for."""
  rng, c = np.random.default_rng(3), FAMILIES[family]
  width, heads = c["hidden_size"], c["num_attention_heads"]
  size, inner = c.get("head_dim", width // heads), c["intermediate_size"]
  queries, keys = heads * size, c["num_key_value_heads"] * size
  shapes = {"model.embed_tokens.weight": (c["vocab_size"], width), "model.norm.weight": (width,)}
  for k in range(c["num_hidden_layers"]):
    layer = f"model.layers.{k}"
    for name, shape in {
      "q": (queries, width),
      "k": (keys, width),
      "v": (keys, width),
      "o": (width, queries),
    }.items():
      shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
      if family == "qwen2" and name != "o":
        shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
      if family == "qwen3" and name in "qk":
        shapes[f"{layer}.self_attn.{name}_norm.weight"] = (size,)
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
    shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
  if not c["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (c["vocab_size"], width)
  return {
    name: rng.normal(1 if "norm" in name else 0, 0.4, shape).astype(np.float32)
    for name, shape in shapes.items()
  }
