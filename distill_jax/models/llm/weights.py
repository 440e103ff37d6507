"""Released Llama and Qwen checkpoints for a `Decoder`: its arguments from config.json, its weights by name.

    config = json.loads((folder / "config.json").read_text())
    model = from_nnx(lambda rngs: Decoder(**decoder_arguments(config), rngs=rngs), inputs="tokens")
    teacher = pretrained(model, folder / "model.safetensors", {}, names=decoder_name, cast=True)

Leaves of a Decoder, under params/, and entries of the file; a kernel is the transposed weight:

    embed/embedding                  model.embed_tokens.weight
    blocks/3/attention_norm/scale    model.layers.3.input_layernorm.weight
    blocks/3/query/kernel            model.layers.3.self_attn.q_proj.weight; key, value, output: k_proj, v_proj, o_proj
    blocks/3/query/bias              model.layers.3.self_attn.q_proj.bias; key, value alike
    blocks/3/query_norm/scale        model.layers.3.self_attn.q_norm.weight; key_norm: k_norm
    blocks/3/inner_norm/scale        model.layers.3.post_attention_layernorm.weight
    blocks/3/gate/kernel             model.layers.3.mlp.gate_proj.weight; up, down: up_proj, down_proj
    norm/scale                       model.norm.weight
    head                             lm_head.weight, transposed; a tied head has no such leaf
"""

from collections.abc import Mapping
from typing import Any

from distill_jax.models.llm.decoder import RopeScaling
from distill_jax.models.weights import Origin, torch_kernel

FAMILIES = ("llama", "qwen2", "qwen3")
_NORMS = {"attention_norm": "input_layernorm", "inner_norm": "post_attention_layernorm"}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_ATTENTION |= {"query_norm": "q_norm", "key_norm": "k_norm"}
_INNER = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_name(name: str) -> Origin:
  """Where a leaf of a `Decoder` lies in a released file: `names=` of `pretrained` and `load_weights`.

  >>> decoder_name("params/blocks/3/query_norm/scale")
  'model.layers.3.self_attn.q_norm.weight'
  """
  parts = name.split("/")[1:]
  if parts[0] != "blocks":
    flat = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    return ("lm_head.weight", torch_kernel) if parts[0] == "head" else flat[parts[0]]
  _, number, layer, leaf = parts
  if layer in _NORMS:
    inside = _NORMS[layer]
  else:
    inside = f"mlp.{_INNER[layer]}" if layer in _INNER else f"self_attn.{_ATTENTION[layer]}"
  theirs = f"model.layers.{number}.{inside}.{'bias' if leaf == 'bias' else 'weight'}"
  return (theirs, torch_kernel) if leaf == "kernel" else theirs


def decoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of the `Decoder` that a released config.json describes.

  Raises:
    ValueError: another family, or something that `Decoder` does not have: it would compute other numbers.
    KeyError: a size is missing.
  """
  family = config.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type {family!r}: expected one of {', '.join(FAMILIES)}")
  refused = {"attention_bias": family != "qwen2", "mlp_bias": True, "use_sliding_window": True}
  for name, unknown in refused.items():
    if config.get(name) and unknown:
      raise ValueError(f"{name}={config[name]!r}: a Decoder has no such thing")
  if config.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act={config['hidden_act']!r}: expected 'silu'")
  base, scaling = _rope(config)
  heads = config["num_attention_heads"]
  return {
    "vocabulary": config["vocab_size"],
    "width": config["hidden_size"],
    "depth": config["num_hidden_layers"],
    "heads": heads,
    "kv_heads": config.get("num_key_value_heads", heads),
    "head_width": config.get("head_dim"),
    "inner": config["intermediate_size"],
    "length": config["max_position_embeddings"],
    "tied": config.get("tie_word_embeddings", False),
    "projection_bias": family == "qwen2",
    "projection_norm": family == "qwen3",
    "rope_base": base,
    "rope_scaling": scaling,
    "epsilon": config["rms_norm_eps"],
  }


def _rope(config) -> tuple[float, RopeScaling | None]:
  """Newer files hold the base among `rope_parameters`, older ones beside `rope_scaling`."""
  found = config.get("rope_parameters") or config.get("rope_scaling") or {}
  kind = found.get("rope_type", found.get("type", "default"))
  base = found.get("rope_theta", config.get("rope_theta", 10_000.0))
  if kind not in ("default", "llama3"):
    raise ValueError(f"rope_type={kind!r}: expected 'default' or 'llama3'")
  return base, None if kind == "default" else RopeScaling(
    *(found[name] for name in RopeScaling._fields)
  )
