"""Translates between config.json of released encoders and `EncoderConfig`."""

import json
from collections.abc import Mapping
from typing import Any

from distill_jax.models.encoders.encoder_config import FAMILIES, EncoderConfig

# An argument of EncoderConfig, its name in config.json, and that of DistilBERT.
_SIZES = {
  "vocab_size": ("vocab_size", "vocab_size"),
  "embed_dim": ("hidden_size", "dim"),
  "num_layers": ("num_hidden_layers", "n_layers"),
  "num_heads": ("num_attention_heads", "n_heads"),
  "mlp_dim": ("intermediate_size", "hidden_dim"),
  "max_length": ("max_position_embeddings", "max_position_embeddings"),
}
_HEADS = {
  "sequence": "ForSequenceClassification",
  "tokens": "ForTokenClassification",
  "spans": "ForQuestionAnswering",
}
_CLASSES = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta"}
_ROBERTA_PADDING = 2
_DEFAULT_LABELS = 2
"""Number of labels where config.json has none: transformers leaves out its default."""


def config_of_settings(settings: Mapping[str, Any], *, pooler: bool) -> EncoderConfig:
  """Returns the `EncoderConfig` of the members of a config.json.

  Args:
    settings: the members.
    pooler: whether the weights have a pooler, which config.json does not say.

  Raises:
    ValueError: another family, or a setting that `Encoder` does not have.
    KeyError: a size is missing.
  """
  family = settings.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")
  _check_settings(settings)
  column = int(family == "distilbert")
  sizes = {field: settings[names[column]] for field, names in _SIZES.items()}
  if family == "roberta":
    sizes["max_length"] -= _ROBERTA_PADDING
  if family != "distilbert":
    sizes["token_types"] = settings.get("type_vocab_size", 2)
    sizes["norm_eps"] = settings.get("layer_norm_eps", 1e-12)
  head = _head(settings)
  if head:
    sizes["num_labels"] = len(settings.get("id2label") or ()) or _DEFAULT_LABELS
  return EncoderConfig(**sizes, head=head, pooler=pooler, family=family)


def released_settings(config: EncoderConfig) -> str:
  """Returns the text of the config.json of a network."""
  column = int(config.family == "distilbert")
  settings: dict[str, Any] = {
    "architectures": [_CLASSES[config.family] + _HEADS.get(config.head, "Model")],
    "model_type": config.family,
    "torch_dtype": "float32",
  }
  settings |= {names[column]: getattr(config, field) for field, names in _SIZES.items()}
  # The network has no dropout: who trains it further chooses.
  if config.family == "distilbert":
    settings |= {"activation": "gelu", "dropout": 0.0, "attention_dropout": 0.0}
    settings |= {"qa_dropout": 0.0, "seq_classif_dropout": 0.0, "sinusoidal_pos_embds": False}
  else:
    settings |= {"hidden_act": "gelu", "hidden_dropout_prob": 0.0}
    settings |= {"attention_probs_dropout_prob": 0.0}
    settings |= {"layer_norm_eps": config.norm_eps, "type_vocab_size": config.token_types}
  if config.family == "roberta":
    settings["max_position_embeddings"] += _ROBERTA_PADDING
    settings |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
  else:
    settings["pad_token_id"] = 0
  if config.head:
    settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
    settings["label2id"] = {name: int(i) for i, name in settings["id2label"].items()}
  if config.head == "sequence" and config.num_labels == 1:
    settings["problem_type"] = "regression"
  return json.dumps(settings, indent=2) + "\n"


def _check_settings(settings: Mapping[str, Any]) -> None:
  expected = {
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
  }
  for name, value in expected.items():
    if settings.get(name, value) not in (value, None):
      raise ValueError(f"{name}: expected {value!r} in an Encoder, got {settings[name]!r}")


def _head(settings: Mapping[str, Any]) -> str:
  """Returns the head that config.json names; '' for a bare network and for pretraining tasks."""
  (name, *_) = settings.get("architectures") or ("",)
  return next((head for head, end in _HEADS.items() if name.endswith(end)), "")
