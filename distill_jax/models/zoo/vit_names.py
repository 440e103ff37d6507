"""Loads released vision transformers into a `ViT`, and writes one under their names.

    settings = json.loads((folder / "config.json").read_text())
    model = from_nnx(lambda rngs: ViT(**vit_arguments(settings), rngs=rngs))
    teacher = pretrained(model, folder / "model.safetensors", {}, names=vit_name)
    save_weights(path, student.variables, names=released_vit_names(channels=3, patch=16))

Parameters of a ViT, under params/, and entries of the file; 'layer' is vit.encoder.layer.3:

    tokens                    vit.embeddings.cls_token
    positions                 vit.embeddings.position_embeddings
    embed                     vit.embeddings.patch_embeddings.projection
    blocks/3/attention_norm   layer.layernorm_before; inner_norm: layernorm_after
    blocks/3/query            layer.attention.attention.query; key, value alike
    blocks/3/output           layer.attention.output.dense
    blocks/3/up, down         layer.intermediate.dense, layer.output.dense
    norm                      vit.layernorm
    head                      classifier

Released networks have 1e-12 as the epsilon of their norms, a ViT has 1e-6: outputs agree to about
1e-5.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distill_jax.models.weights import Origin, torch_kernel

_OUTER = {
  "tokens": "vit.embeddings.cls_token",
  "positions": "vit.embeddings.position_embeddings",
  "embed": "vit.embeddings.patch_embeddings.projection",
  "norm": "vit.layernorm",
  "head": "classifier",
}
_BLOCK = {
  "attention_norm": "layernorm_before",
  "query": "attention.attention.query",
  "key": "attention.attention.key",
  "value": "attention.attention.value",
  "output": "attention.output.dense",
  "inner_norm": "layernorm_after",
  "up": "intermediate.dense",
  "down": "output.dense",
}
_SETTINGS = {"hidden_act": "gelu", "qkv_bias": True}


def vit_name(leaf: str) -> Origin:
  """Returns where a released file has a parameter of a `ViT`: `names=` of `pretrained`.

  >>> vit_name("params/blocks/3/up/bias")
  'vit.encoder.layer.3.intermediate.dense.bias'
  """
  entry = _entry(leaf)
  if leaf in ("params/tokens", "params/positions"):
    return entry, lambda x: x[0]
  if leaf == "params/embed/kernel":
    # [outputs, channels, height, width] -> the order of a patch: row, column, channel.
    return entry, lambda x: torch_kernel(x).reshape(-1, len(x))
  return (entry, torch_kernel) if leaf.endswith("/kernel") else entry


def released_vit_names(*, channels: int, patch: int) -> Callable[[str], Origin]:
  """Returns the names for `save_weights`: the reverse of `vit_name`.

  Args:
    channels: number of channels of the images.
    patch: height and width of the patches.

  >>> name, convert = released_vit_names(channels=3, patch=4)("params/embed/kernel")
  >>> convert(np.zeros((48, 10))).shape
  (10, 3, 4, 4)
  """

  def name(leaf: str) -> Origin:
    entry = _entry(leaf)
    if leaf in ("params/tokens", "params/positions"):
      return entry, lambda x: x[None]
    if leaf == "params/embed/kernel":
      return entry, lambda x: x.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)
    return (entry, np.transpose) if leaf.endswith("/kernel") else entry

  return name


def vit_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of the `ViT` that a released config.json describes.

  Args:
    settings: the members of config.json; without labels there are 2 classes, as in transformers.

  Raises:
    ValueError: another family, or a setting that `ViT` does not have: its outputs would be wrong.
    KeyError: a size is missing.
  """
  if settings.get("model_type") != "vit":
    raise ValueError(f"model_type: expected 'vit', got {settings.get('model_type')!r}")
  for name, value in _SETTINGS.items():
    if settings.get(name, value) != value:
      raise ValueError(f"{name}: expected {value!r} in a ViT, got {settings[name]!r}")
  return {
    "channels": settings["num_channels"],
    "size": settings["image_size"],
    "classes": len(settings.get("id2label") or "01"),
    "embed_dim": settings["hidden_size"],
    "num_layers": settings["num_hidden_layers"],
    "num_heads": settings["num_attention_heads"],
    "patch": settings["patch_size"],
    "mlp_ratio": settings["intermediate_size"] / settings["hidden_size"],
  }


def _entry(leaf: str) -> str:
  parts = leaf.split("/")[1:]
  end = "bias" if parts[-1] == "bias" else "weight"
  if parts[0] == "blocks":
    return f"vit.encoder.layer.{parts[1]}.{_BLOCK[parts[2]]}.{end}"
  entry = _OUTER[parts[0]]
  return entry if parts[0] in ("tokens", "positions") else f"{entry}.{end}"
