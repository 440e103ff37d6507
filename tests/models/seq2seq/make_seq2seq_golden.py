"""Writes seq2seq_golden.json: what `transformers` computes with the networks of seq2seq_cases.py.

python -m venv /tmp/peers
/tmp/peers/bin/pip install torch transformers==5.3.0
cd tests/models/seq2seq && HF_HUB_OFFLINE=1 /tmp/peers/bin/python make_seq2seq_golden.py

`make_seq2seq_golden.py CASE FOLDER` compares the golden outputs with those of a folder that
`save_seq2seq` wrote.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers
from seq2seq_cases import CASES, MASK, MAX_NEW_TOKENS, NUM_BEAMS, SOURCE, TOKENS, entry

GOLDEN = pathlib.Path(__file__).with_name("seq2seq_golden.json")
TIED = ("embed_tokens.weight", "embed_positions.weight", "lm_head.weight")


def case_of(name: str) -> dict:
  """The configuration as transformers writes it, the entries' shapes, and outputs of all rows."""
  kind, arguments = CASES[name]
  config = getattr(transformers, kind).config_class(**arguments)
  entries = {k: list(x.shape) for k, x in getattr(transformers, kind)(config).state_dict().items()}
  if arguments.get("tie_word_embeddings", True):  # transformers writes no tied weights.
    entries = {k: shape for k, shape in entries.items() if not k.endswith(TIED)}
  elif "t5" in name:
    entries = {k: shape for k, shape in entries.items() if not k.endswith(TIED[:2])}
  else:
    entries = {k: shape for k, shape in entries.items() if not k.endswith(TIED[1])}
  settings = {**json.loads(config.to_json_string()), **arguments, "architectures": [kind]}
  with tempfile.TemporaryDirectory() as folder:
    arrays = {k: entry(k, shape) for k, shape in entries.items()}
    path = pathlib.Path(folder, "model.safetensors")
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    path.with_name("config.json").write_text(json.dumps(settings))
    return {"config": settings, "entries": entries, **results(folder, kind)}


def results(folder: str, kind: str) -> dict:
  """Outputs and beams of the network in a folder."""
  network = getattr(transformers, kind)
  model = network.from_pretrained(folder, attn_implementation="eager").eval()
  inputs = {"input_ids": torch.tensor(SOURCE), "attention_mask": torch.tensor(MASK).int()}
  decoder = {"decoder_input_ids": torch.tensor(TOKENS)}
  with torch.no_grad():
    out = model(**inputs, **decoder, output_hidden_states=True, output_attentions=True)
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
  beams = None
  # generate() expects logits of config.vocab_size, the source's.
  if out.logits.shape[-1] == model.config.vocab_size:
    beams = beam_search(model, inputs)
    named["beam_scores"] = beams.sequences_scores
    beams = end_padded(beams.sequences.numpy(), model.config.eos_token_id)
  arrays = {name: np.round(x.numpy().astype(float), 5).tolist() for name, x in named.items()}
  return {"outputs": arrays, "beams": beams}


def beam_search(model, inputs):
  """The n-best sequences as `models.decoding.beam_search` has them."""
  return model.generate(
    **inputs,
    num_beams=NUM_BEAMS,
    num_return_sequences=NUM_BEAMS,
    length_penalty=1.0,
    early_stopping=False,
    max_new_tokens=MAX_NEW_TOKENS,
    forced_eos_token_id=None,
    pad_token_id=model.config.eos_token_id,
    return_dict_in_generate=True,
    output_scores=True,
  )


def end_padded(sequences, end_token: int) -> list:
  """Sequences [rows, beams, MAX_NEW_TOKENS] without the start token."""
  missing = MAX_NEW_TOKENS + 1 - sequences.shape[1]
  rows = np.pad(sequences[:, 1:], ((0, 0), (0, missing)), constant_values=end_token)
  return rows.reshape(-1, NUM_BEAMS, MAX_NEW_TOKENS).tolist()


def compare(name: str, folder: str) -> None:
  """Prints the greatest difference between the golden outputs and those of a written folder."""
  golden = json.loads(GOLDEN.read_text())[name]
  actual = results(folder, CASES[name][0])
  pairs = [(golden["outputs"][k], actual["outputs"][k]) for k in golden["outputs"]]
  difference = max(np.abs(np.subtract(a, b)).max() for a, b in pairs)
  print(name, f"{difference:.1e}", golden["beams"] == actual["beams"])


if __name__ == "__main__":
  if len(sys.argv) == 3:
    compare(*sys.argv[1:])
  else:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    GOLDEN.write_text(json.dumps(versions | {name: case_of(name) for name in CASES}) + "\n")
