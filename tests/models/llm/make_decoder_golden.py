"""Writes decoder_golden.json: what `transformers` computes with the checkpoints of
decoder_files.py.
 python -m venv /tmp/peers /tmp/peers/bin/pip install torch==2.13.0 transformers==5.23.0   (torch's
CPU wheel, where there is one) cd tests/models/llm && /tmp/peers/bin/python make_decoder_golden.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from decoder_files import FAMILIES, TOKENS, weights

CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def outputs(family: str) -> dict:
  """The configuration as transformers writes it, outputs of the first row, greedy continuations of
  both."""
  config = getattr(transformers, f"{CLASSES[family]}Config")(
    **FAMILIES[family], attn_implementation="eager"
  )
  model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval()
  entries = {name: torch.tensor(value) for name, value in weights(family).items()}
  missing, unexpected = model.load_state_dict(entries, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
  model.tie_weights()
  tokens = torch.tensor(TOKENS)
  greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
  with torch.no_grad():
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    text = model.generate(tokens, attention_mask=torch.ones_like(tokens), **greedy)
  named = {"block1": out.hidden_states[1], "hidden": out.hidden_states[-1], "logits": out.logits}
  named |= {"attention2": out.attentions[1][:, :, -1]}  # of the last query
  arrays = {
    name: np.round(value[0].numpy().astype(float), 5).tolist() for name, value in named.items()
  }
  settings = json.loads(config.to_json_string())
  return {"config": settings, "greedy": text[:, tokens.shape[1] :].tolist(), **arrays}


if __name__ == "__main__":
  found = {family: outputs(family) for family in FAMILIES}
  text = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, **found})
  pathlib.Path(__file__).with_name("decoder_golden.json").write_text(text + "\n")
