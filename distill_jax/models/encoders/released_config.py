"""Translates between config.json of released encoders and `EncoderConfig`."""

import json
from collections.abc import Mapping
from typing import Any

from distill_jax.models.encoders.encoder_config import FAMILIES, EncoderConfig, ModernOptions

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
_MASKED = "ForMaskedLM"
_CLASSES = {
  "bert": "Bert",
  "distilbert": "DistilBert",
  "roberta": "Roberta",
  "modernbert": "ModernBert",
}
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
  if family == "modernbert":
    sizes["norm_eps"] = settings.get("norm_eps", 1e-5)
    sizes["modern"] = _modern_options(settings)
  elif family != "distilbert":
    sizes["token_types"] = settings.get("type_vocab_size", 2)
    sizes["norm_eps"] = settings.get("layer_norm_eps", 1e-12)
  head = _head(settings)
  if head:
    sizes["num_labels"] = len(settings.get("id2label") or ()) or _DEFAULT_LABELS
  return EncoderConfig(**sizes, head=head, pooler=pooler, family=family)


def released_settings(config: EncoderConfig) -> str:
  """Returns the text of the config.json of a network."""
  column = int(config.family == "distilbert")
  kind = _MASKED if config.head == "masked" else _HEADS.get(config.head, "Model")
  settings: dict[str, Any] = {
    "architectures": [_CLASSES[config.family] + kind],
    "model_type": config.family,
    "torch_dtype": "float32",
  }
  settings |= {names[column]: getattr(config, field) for field, names in _SIZES.items()}
  # The network has no dropout: who trains it further chooses.
  if config.family == "distilbert":
    settings |= {"activation": "gelu", "dropout": 0.0, "attention_dropout": 0.0}
    settings |= {"qa_dropout": 0.0, "seq_classif_dropout": 0.0, "sinusoidal_pos_embds": False}
  elif config.modern is not None:
    settings |= _modern_settings(config, config.modern)
  else:
    settings |= {"hidden_act": "gelu", "hidden_dropout_prob": 0.0}
    settings |= {"attention_probs_dropout_prob": 0.0}
    settings |= {"layer_norm_eps": config.norm_eps, "type_vocab_size": config.token_types}
  if config.family == "roberta":
    settings["max_position_embeddings"] += _ROBERTA_PADDING
    settings |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
  else:
    settings["pad_token_id"] = 0
  if config.num_labels:
    settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
    settings["label2id"] = {name: int(i) for i, name in settings["id2label"].items()}
  if config.head == "sequence" and config.num_labels == 1:
    settings["problem_type"] = "regression"
  return json.dumps(settings, indent=2) + "\n"


def _modern_options(settings: Mapping[str, Any]) -> ModernOptions:
  """Returns the options of ModernBERT; older files have no `layer_types` and `rope_parameters`."""
  count = settings["num_hidden_layers"]
  every = settings.get("global_attn_every_n_layers", 3)
  kinds = settings.get("layer_types")
  if kinds and list(kinds) != _layer_types(count, every):
    every = next((k for k in range(1, count) if kinds[k] == "full_attention"), count)
    if list(kinds) != _layer_types(count, every):
      raise ValueError(f"layer_types: expected every n-th layer with full attention, got {kinds}")
  rope = settings.get("rope_parameters") or {}
  thetas = {}
  for field, kind, default in (
    ("global", "full_attention", 160_000.0),
    ("local", "sliding_attention", 10_000.0),
  ):
    parameters = rope.get(kind) or {}
    if parameters.get("rope_type", "default") != "default":
      raise ValueError(f"rope_type: expected 'default', got {parameters['rope_type']!r}")
    older = settings.get(f"{field}_rope_theta", default)
    thetas[f"{field}_theta"] = parameters.get("rope_theta", older)
  return ModernOptions(
    **thetas,
    window=settings.get("local_attention", 128),
    global_every=every,
    mean_pooling=settings.get("classifier_pooling", "cls") == "mean",
  )


def _modern_settings(config: EncoderConfig, modern: ModernOptions) -> dict[str, Any]:
  return {
    "hidden_activation": "gelu",
    "norm_eps": config.norm_eps,
    "local_attention": modern.window,
    "global_attn_every_n_layers": modern.global_every,
    "layer_types": _layer_types(config.num_layers, modern.global_every),
    "global_rope_theta": modern.global_theta,
    "local_rope_theta": modern.local_theta,
    "rope_parameters": {
      "full_attention": {"rope_type": "default", "rope_theta": modern.global_theta},
      "sliding_attention": {"rope_type": "default", "rope_theta": modern.local_theta},
    },
    "classifier_pooling": "mean" if modern.mean_pooling else "cls",
  }


def _layer_types(count: int, every: int) -> list[str]:
  return ["sliding_attention" if k % every else "full_attention" for k in range(count)]


def _check_settings(settings: Mapping[str, Any]) -> None:
  expected = {
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
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
