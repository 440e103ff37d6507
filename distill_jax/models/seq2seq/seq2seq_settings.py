"""Translates between config.json of T5 and Marian and `EncoderDecoderConfig`."""

import json
from collections.abc import Mapping
from typing import Any

from distill_jax.models.seq2seq.encoder_decoder_config import (
  EncoderDecoderConfig,
  RelativePositions,
)

FAMILIES = ("t5", "marian")
_T5_SIZES = {  # An argument of EncoderDecoderConfig, and its name in config.json.
  "vocab_size": "vocab_size",
  "embed_dim": "d_model",
  "encoder_layers": "num_layers",
  "num_heads": "num_heads",
  "head_dim": "d_kv",
  "mlp_dim": "d_ff",
}
_T5_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "swish", "gated-gelu": "gated_gelu"}
_MARIAN_SIZES = {
  "embed_dim": "d_model",
  "encoder_layers": "encoder_layers",
  "decoder_layers": "decoder_layers",
  "num_heads": "encoder_attention_heads",
  "mlp_dim": "encoder_ffn_dim",
  "max_length": "max_position_embeddings",
}
_MARIAN_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "swish", "silu": "swish"}
_MARIAN_FIXED = {
  "normalize_before": False,
  "normalize_embedding": False,
  "add_final_layer_norm": False,
  "static_position_embeddings": True,
}
_MARIAN_NORM_EPS = 1e-5
"""What transformers computes with, whatever config.json says."""


def config_of_settings(settings: Mapping[str, Any]) -> EncoderDecoderConfig:
  """Returns the `EncoderDecoderConfig` of the members of a config.json.

  Raises:
    ValueError: another family, or a setting that `EncoderDecoder` does not have.
    KeyError: a size is missing.
  """
  family = settings.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")
  read = _read_t5 if family == "t5" else _read_marian
  start = settings.get("decoder_start_token_id", settings.get("pad_token_id"))
  return EncoderDecoderConfig(
    **read(settings),
    family=family,
    start_token=start,
    end_token=settings.get("eos_token_id"),
  )


def released_settings(config: EncoderDecoderConfig) -> str:
  """Returns the text of the config.json of a network.

  Raises:
    ValueError: a family or a size that transformers does not have, or no special tokens.
  """
  if config.family not in FAMILIES:
    raise ValueError(
      f"family: expected one of {', '.join(FAMILIES)}, which transformers reads, got "
      f"{config.family!r}: write its variables with storage.student or models.save_weights"
    )
  for field in ("start_token", "end_token"):
    if getattr(config, field) is None:
      raise ValueError(f"{field}: expected a token in the config, got None")
  settings: dict[str, Any] = {
    "model_type": config.family,
    "torch_dtype": "float32",
    "is_encoder_decoder": True,
    "decoder_start_token_id": config.start_token,
    "pad_token_id": config.start_token,
    "eos_token_id": config.end_token,
  }
  # The network has no dropout: who trains it further chooses.
  settings |= _t5_settings(config) if config.family == "t5" else _marian_settings(config)
  return json.dumps(settings, indent=2) + "\n"


def _read_t5(settings: Mapping[str, Any]) -> dict[str, Any]:
  projection = settings.get("feed_forward_proj", "relu")
  sizes = {field: settings[name] for field, name in _T5_SIZES.items()}
  # transformers 5 writes of v1.1 that its embeddings are tied, and not its head's.
  tied = settings.get("tie_word_embeddings", True)
  return sizes | {
    "decoder_layers": settings.get("num_decoder_layers") or sizes["encoder_layers"],
    "tie_embeddings": bool(settings.get("scale_decoder_outputs", tied)),
    "max_length": settings.get("n_positions", 512),
    "activation": _activation("feed_forward_proj", projection, _T5_ACTIVATIONS),
    "norm_eps": settings.get("layer_norm_epsilon", 1e-6),
    "relative": RelativePositions(
      settings.get("relative_attention_num_buckets", 32),
      settings.get("relative_attention_max_distance", 128),
    ),
  }


def _t5_settings(config: EncoderDecoderConfig) -> dict[str, Any]:
  if config.source_vocab_size:
    raise ValueError(
      f"source_vocab_size: expected 0 in T5, which shares its embeddings, got "
      f"{config.source_vocab_size}"
    )
  relative = config.relative or RelativePositions()
  return {name: getattr(config, field) for field, name in _T5_SIZES.items()} | {
    "architectures": ["T5ForConditionalGeneration"],
    "num_decoder_layers": config.decoder_layers,
    "n_positions": config.max_length,
    "feed_forward_proj": _released_activation(config, _T5_ACTIVATIONS),
    "layer_norm_epsilon": config.norm_eps,
    "relative_attention_num_buckets": relative.num_buckets,
    "relative_attention_max_distance": relative.max_distance,
    "tie_word_embeddings": config.tie_embeddings,
    "dropout_rate": 0.0,
  }


def _read_marian(settings: Mapping[str, Any]) -> dict[str, Any]:
  _check_marian(settings)
  activation = settings.get("activation_function", "gelu")
  is_shared = settings.get("share_encoder_decoder_embeddings", True)
  vocab_size = settings["vocab_size"]
  return {field: settings[name] for field, name in _MARIAN_SIZES.items()} | {
    "vocab_size": vocab_size if is_shared else settings.get("decoder_vocab_size") or vocab_size,
    "source_vocab_size": 0 if is_shared else vocab_size,
    "tie_embeddings": bool(is_shared or settings.get("tie_word_embeddings", True)),
    "activation": _activation("activation_function", activation, _MARIAN_ACTIVATIONS),
    "norm_eps": _MARIAN_NORM_EPS,
    "suppressed_tokens": _suppressed_tokens(settings),
  }


def _suppressed_tokens(settings: Mapping[str, Any]) -> tuple[int, ...]:
  words = settings.get("bad_words_ids") or []
  if any(len(word) != 1 for word in words):
    raise ValueError(f"bad_words_ids: expected words of one token each, got {words}")
  return tuple(word[0] for word in words)


def _check_marian(settings: Mapping[str, Any]) -> None:
  for name, value in _MARIAN_FIXED.items():
    if settings.get(name, value) not in (value, None):
      raise ValueError(f"{name}: expected {value!r} in an EncoderDecoder, got {settings[name]!r}")
  if not settings.get("scale_embedding", False):
    raise ValueError("scale_embedding: expected True in an EncoderDecoder, got False")
  for size in ("attention_heads", "ffn_dim"):
    encoder, decoder = (settings[f"{side}_{size}"] for side in ("encoder", "decoder"))
    if encoder != decoder:
      raise ValueError(f"decoder_{size}: expected {encoder}, that of the encoder, got {decoder}")


def _marian_settings(config: EncoderDecoderConfig) -> dict[str, Any]:
  fixed = {
    "norm_eps": _MARIAN_NORM_EPS,
    "head_dim": config.embed_dim // config.num_heads,
    "tie_embeddings": not config.source_vocab_size,
  }
  for field, value in fixed.items():
    if getattr(config, field) != value:
      raise ValueError(
        f"{field}: expected {value} in Marian as transformers has it, got {getattr(config, field)}"
      )
  sizes = {name: getattr(config, field) for field, name in _MARIAN_SIZES.items()}
  return (
    sizes
    | _MARIAN_FIXED
    | {
      "architectures": ["MarianMTModel"],
      "vocab_size": config.source_vocab_size or config.vocab_size,
      "decoder_vocab_size": config.vocab_size,
      "decoder_attention_heads": config.num_heads,
      "decoder_ffn_dim": config.mlp_dim,
      "activation_function": _released_activation(config, _MARIAN_ACTIVATIONS),
      "scale_embedding": True,
      "share_encoder_decoder_embeddings": not config.source_vocab_size,
      "tie_word_embeddings": config.tie_embeddings,
      "forced_eos_token_id": config.end_token,
      "bad_words_ids": [[token] for token in config.suppressed_tokens] or None,
      "dropout": 0.0,
    }
  )


def _activation(name: str, value: str, activations: Mapping[str, str]) -> str:
  if value not in activations:
    raise ValueError(f"{name}: expected one of {', '.join(activations)}, got {value!r}")
  return activations[value]


def _released_activation(config: EncoderDecoderConfig, activations: Mapping[str, str]) -> str:
  for name, activation in activations.items():
    if activation == config.activation:
      return name
  raise ValueError(
    f"activation: expected one of {', '.join(activations.values())} in the family "
    f"{config.family!r}, got {config.activation!r}"
  )
