"""Writes whisper_golden.json: what `transformers` computes with the network of whisper_cases.py.

python -m venv /tmp/peers
/tmp/peers/bin/pip install torch transformers==5.3.0
cd tests/models/speech && HF_HUB_OFFLINE=1 /tmp/peers/bin/python make_whisper_golden.py

`make_whisper_golden.py FOLDER` compares the golden outputs with those of a folder that
`save_whisper` wrote.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper_cases import CONFIG, FEATURES, GENERATION, PROMPT, TOKENS, entry

GOLDEN = pathlib.Path(__file__).with_name("whisper_golden.json")


def golden() -> dict:
  """The configuration as transformers writes it, the entries' shapes, and outputs."""
  config = WhisperConfig(**CONFIG)
  state = WhisperForConditionalGeneration(config).state_dict()
  # transformers writes no tied weights.
  entries = {k: list(x.shape) for k, x in state.items() if k != "proj_out.weight"}
  settings = {**json.loads(config.to_json_string()), **CONFIG}
  with tempfile.TemporaryDirectory() as folder:
    arrays = {k: entry(k, shape) for k, shape in entries.items()}
    path = pathlib.Path(folder, "model.safetensors")
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    path.with_name("config.json").write_text(json.dumps(settings))
    path.with_name("generation_config.json").write_text(json.dumps(GENERATION))
    results = {"outputs": outputs(folder), "generated": generated(folder)}
    return {"config": settings, "entries": entries} | results


def outputs(folder: str) -> dict:
  """Outputs of the network in a folder."""
  network = WhisperForConditionalGeneration
  model = network.from_pretrained(folder, attn_implementation="eager").eval()
  features = torch.tensor(FEATURES).mT
  arguments = {"decoder_input_ids": torch.tensor(TOKENS)}
  with torch.no_grad():
    out = model(features, **arguments, output_hidden_states=True, output_attentions=True)
  named = {
    "logits": out.logits,
    "encoded": out.encoder_last_hidden_state,
    "encoder_block1": out.encoder_hidden_states[1],
    "hidden": out.decoder_hidden_states[-1],
    "block1": out.decoder_hidden_states[1],
    "encoder_attention2": out.encoder_attentions[1],
    "attention2": out.decoder_attentions[1],
    "cross_attention2": out.cross_attentions[1],
  }
  return {name: np.round(x.numpy().astype(float), 5).tolist() for name, x in named.items()}


def generated(folder: str) -> list:
  """What the network in a folder says after the prompt, at most 6 tokens."""
  model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
  prompt = torch.tensor([PROMPT] * len(FEATURES))
  arguments = {"decoder_input_ids": prompt, "max_new_tokens": 6, "do_sample": False}
  # Whisper's own generate adds the prompt of a released tokenizer.
  tokens = transformers.GenerationMixin.generate(model, torch.tensor(FEATURES).mT, **arguments)
  return tokens[:, len(PROMPT) :].tolist()


if __name__ == "__main__":
  if len(sys.argv) == 2:
    golden_file = json.loads(GOLDEN.read_text())
    expected, actual = golden_file["outputs"], outputs(sys.argv[1])
    assert generated(sys.argv[1]) == golden_file["generated"]
    print(max(np.abs(np.subtract(expected[k], actual[k])).max() for k in expected))
  else:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    GOLDEN.write_text(json.dumps(versions | golden()) + "\n")
