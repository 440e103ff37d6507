"""Writes vit_golden.json: what `transformers` computes with a tiny vision transformer.

python -m venv /tmp/peers
/tmp/peers/bin/pip install torch transformers==5.24.0
cd tests/models/zoo && /tmp/peers/bin/python make_vit_golden.py
"""

import json
import pathlib
import zlib

import numpy as np

SIZES = {
  "hidden_size": 12,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "image_size": 8,
  "patch_size": 4,
  "num_channels": 2,
  "num_labels": 5,
}
IMAGES = np.random.default_rng(7).normal(size=(2, 8, 8, 2)).astype(np.float32)


def entry(name: str, shape) -> np.ndarray:
  """Random values of an entry of a file, float32: the same wherever they are asked for."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  is_scale = "norm" in name and name.endswith("weight")
  return rng.normal(1 if is_scale else 0, 0.3, shape).astype(np.float32)


if __name__ == "__main__":
  import tempfile

  import safetensors.torch
  import torch
  import transformers

  config = transformers.ViTConfig(**SIZES, attn_implementation="eager")
  network = transformers.ViTForImageClassification(config).eval()
  # Files keep the names that released ones have, whatever the module's are.
  with tempfile.TemporaryDirectory() as folder:
    network.save_pretrained(folder)
    path = pathlib.Path(folder) / "model.safetensors"
    entries = {name: list(x.shape) for name, x in safetensors.torch.load_file(path).items()}
    arrays = {name: torch.tensor(entry(name, shape)) for name, shape in entries.items()}
    safetensors.torch.save_file(arrays, path, metadata={"format": "pt"})
    network = transformers.ViTForImageClassification.from_pretrained(
      folder, attn_implementation="eager"
    ).eval()
  with torch.no_grad():
    out = network(torch.tensor(IMAGES).permute(0, 3, 1, 2), output_hidden_states=True)
  named = {"logits": out.logits, "embedded": out.hidden_states[0], "block1": out.hidden_states[1]}
  outputs = {name: np.round(x.numpy().astype(float), 5).tolist() for name, x in named.items()}
  versions = {"transformers": transformers.__version__, "torch": torch.__version__}
  golden = {"config": json.loads(config.to_json_string()), "entries": entries, "outputs": outputs}
  path = pathlib.Path(__file__).with_name("vit_golden.json")
  path.write_text(json.dumps(versions | golden) + "\n")
