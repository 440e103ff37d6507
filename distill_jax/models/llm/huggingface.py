"""Loads released Llama and Qwen checkpoints into a `Decoder`: its arguments, its weights by name.

    config = json.loads((folder / "config.json").read_text())
    model = from_nnx(lambda rngs: Decoder(**decoder_arguments(config), rngs=rngs), inputs="tokens")
    teacher = pretrained(model, folder / "model.safetensors", {}, names=decoder_name, cast=True)
 Parameters of a Decoder, under params/, and entries of the file. A kernel is the transposed weight;
input_layernorm, self_attn and mlp are in model.layers.3:

    embed/embedding                  model.embed_tokens.weight
    blocks/3/attention_norm/scale    input_layernorm.weight
    blocks/3/query/kernel            self_attn.q_proj.weight; key, value, output: k_, v_, o_proj
    blocks/3/query/bias              self_attn.q_proj.bias; key, value alike
    blocks/3/query_norm/scale        self_attn.q_norm.weight; key_norm: k_norm
    blocks/3/inner_norm/scale        post_attention_layernorm.weight
    blocks/3/gate/kernel             mlp.gate_proj.weight; up, down: up_proj, down_proj
    norm/scale                       model.norm.weight
    head                             lm_head.weight, transposed; a tied head has no such parameter
"""

from collections.abc import Mapping
from typing import Any

from distill_jax.models.llm.decoder import DecoderOptions
from distill_jax.models.llm.rope import RopeScaling
from distill_jax.models.weights import Origin, torch_kernel

FAMILIES = ("llama", "qwen2", "qwen3")
_OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
_NORMS = {"attention_norm": "input_layernorm", "inner_norm": "post_attention_layernorm"}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_ATTENTION |= {"query_norm": "q_norm", "key_norm": "k_norm"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_name(name: str) -> Origin:
  """Returns where a released file has a parameter of a `Decoder`: `names=` of `pretrained`.

  >>> decoder_name("params/blocks/3/query_norm/scale")
  'model.layers.3.self_attn.q_norm.weight'
  """
  parts = name.split("/")[1:]
  if parts[0] == "head":
    return "lm_head.weight", torch_kernel
  if parts[0] != "blocks":
    return _OUTER[parts[0]]
  _, number, layer, leaf = parts
  if layer in _NORMS:
    part = _NORMS[layer]
  elif layer in _MLP:
    part = f"mlp.{_MLP[layer]}"
  else:
    part = f"self_attn.{_ATTENTION[layer]}"
  entry = f"model.layers.{number}.{part}.{'bias' if leaf == 'bias' else 'weight'}"
  return (entry, torch_kernel) if leaf == "kernel" else entry


def decoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of the `Decoder` that a released config.json describes.

  Raises:
    ValueError: another family, or a setting that `Decoder` does not have: its outputs would be
      wrong.
    KeyError: a size is missing.
  """
  family = config.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")
  _check_settings(config, family)
  theta, scaling = _rope(config)
  num_heads = config["num_attention_heads"]
  return {
    "vocab_size": config["vocab_size"],
    "embed_dim": config["hidden_size"],
    "num_layers": config["num_hidden_layers"],
    "num_heads": num_heads,
    "num_kv_heads": config.get("num_key_value_heads", num_heads),
    "head_dim": config.get("head_dim"),
    "mlp_dim": config["intermediate_size"],
    "tie_embeddings": config.get("tie_word_embeddings", False),
    "qkv_bias": family == "qwen2",
    "qk_norm": family == "qwen3",
    "options": DecoderOptions(
      max_length=config["max_position_embeddings"],
      rope_theta=theta,
      rope_scaling=scaling,
      norm_eps=config["rms_norm_eps"],
    ),
  }


def _check_settings(config: Mapping[str, Any], family: str) -> None:
  # Files of Qwen 2 may have attention_bias, which is the bias that this family always has.
  unsupported = ["mlp_bias", "use_sliding_window"]
  if family != "qwen2":
    unsupported.append("attention_bias")
  for name in unsupported:
    if config.get(name):
      raise ValueError(f"{name}: expected none in a Decoder, got {config[name]!r}")
  if config.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act: expected 'silu', got {config['hidden_act']!r}")


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns theta and the scaling, which newer files have in `rope_parameters`."""
  settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
  kind = settings.get("rope_type", settings.get("type", "default"))
  theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
  if kind == "default":
    return theta, None
  if kind == "llama3":
    return theta, RopeScaling(*(settings[name] for name in RopeScaling._fields))
  raise ValueError(f"rope_type: expected 'default' or 'llama3', got {kind!r}")
