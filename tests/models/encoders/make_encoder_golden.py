"""Writes encoder_golden.json: what `transformers` computes with the encoders of encoder_cases.py.

python -m venv /tmp/peers
/tmp/peers/bin/pip install torch transformers==5.24.0
cd tests/models/encoders && /tmp/peers/bin/python make_encoder_golden.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from encoder_cases import CASES, MASK, TOKEN_TYPES, TOKENS, entry

OUTPUTS = {"pooler_output": "pooled", "logits": "logits", "start_logits": "start"}
OUTPUTS |= {"end_logits": "end"}


def outputs(case: str) -> dict:
  """The configuration as transformers writes it, the entries' shapes, and outputs of all rows."""
  kind, arguments = CASES[case]
  network = getattr(transformers, kind)
  config = network.config_class(**arguments, attn_implementation="eager")
  model = network(config).eval()
  entries = {name: list(value.shape) for name, value in model.state_dict().items()}
  # transformers writes no tied weights.
  tied = ("position_ids", *(getattr(model, "_tied_weights_keys", None) or ()))
  entries = {name: shape for name, shape in entries.items() if not name.endswith(tied)}
  weights = {name: torch.tensor(entry(name, shape)) for name, shape in entries.items()}
  model.load_state_dict(weights, strict=False)
  model.tie_weights()
  inputs = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(MASK).int()}
  if config.model_type == "bert":
    inputs["token_type_ids"] = torch.tensor(TOKEN_TYPES)
  with torch.no_grad():
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
  named = {name: out[key] for key, name in OUTPUTS.items() if out.get(key) is not None}
  named |= {"embedded": out.hidden_states[0], "hidden": out.hidden_states[-1]}
  named |= {"attention2": out.attentions[1]}
  arrays = {name: np.round(x.numpy().astype(float), 5).tolist() for name, x in named.items()}
  settings = {**json.loads(config.to_json_string()), "architectures": [kind]}
  return {"config": settings, "entries": entries, "outputs": arrays}


if __name__ == "__main__":
  cases = {case: outputs(case) for case in CASES}
  versions = {"transformers": transformers.__version__, "torch": torch.__version__}
  path = pathlib.Path(__file__).with_name("encoder_golden.json")
  path.write_text(json.dumps(versions | cases) + "\n")
