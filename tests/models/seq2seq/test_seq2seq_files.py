"""Tests released T5 and Marian, in and out, against the names and outputs of transformers."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from seq2seq_cases import CASES, MASK, MAX_NEW_TOKENS, NUM_BEAMS, SOURCE, TOKENS, entry

from distill_jax.models import from_nnx
from distill_jax.models.decoding import beam_search
from distill_jax.models.llm.head import head_logits
from distill_jax.models.seq2seq.cached_steps import decoder_steps
from distill_jax.models.seq2seq.encoder_decoder import EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.seq2seq.seq2seq_files import (
  load_seq2seq,
  read_seq2seq_config,
  save_seq2seq,
)

GOLDEN = json.loads(pathlib.Path(__file__).with_name("seq2seq_golden.json").read_text())
BEAM_CASES = ("t5", "marian")
BATCH = {"source": SOURCE, "source_segments": MASK - 1, "tokens": TOKENS}


def write(folder, case, *, rename=lambda name: name, copies=(), drop="-", **changes):
  """Writes a released folder, with other names, without some entries, or with other settings."""
  golden = GOLDEN[case]
  arrays = {name: entry(name, shape) for name, shape in golden["entries"].items()}
  arrays = {rename(name): x for name, x in arrays.items() if not name.startswith(drop)}
  arrays |= {name: np.ones((19, 12), np.float32) for name in copies}
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(golden["config"] | changes))
  return folder


@pytest.mark.parametrize(
  "case",
  [case if case in BEAM_CASES else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_outputs_beams_and_written_folder_equal_those_of_transformers(case, tmp_path):
  folder = write(tmp_path, case)
  config = read_seq2seq_config(folder)
  model = load_seq2seq(folder)

  def run(variables):
    outputs = model.apply(*variables, BATCH, train=False, key=None)[0]
    steps = decoder_steps(lambda rngs: EncoderDecoder(config, rngs=rngs))
    search = beam_search(steps, max_length=MAX_NEW_TOKENS, beam_size=NUM_BEAMS)
    beams = search(variables, BATCH) if case in BEAM_CASES else None
    return {**outputs, "logits": head_logits(outputs)}, beams

  outputs, beams = jax.jit(run)(model.variables)
  expected = dict(GOLDEN[case]["outputs"])
  scores = expected.pop("beam_scores", None)
  if beams is not None:
    scores = np.reshape(scores, beams.scores.shape)
    np.testing.assert_allclose(beams.scores, scores, atol=2e-5)
    np.testing.assert_array_equal(beams.tokens, GOLDEN[case]["beams"])
  for name, values in expected.items():
    actual = outputs[name]
    actual = jax.nn.softmax(actual) if "attention" in name else actual
    np.testing.assert_allclose(actual, np.array(values), atol=2e-5, err_msg=name)
  check_written_folder(save_seq2seq(tmp_path / "student", model.variables, config), config, case)


def check_written_folder(folder, config, case):
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  assert {name: list(x.shape) for name, x in arrays.items()} == GOLDEN[case]["entries"]
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, entry(name, value.shape))
  assert read_seq2seq_config(folder) == config
  settings = json.loads((folder / "config.json").read_text())
  golden = GOLDEN[case]["config"]
  for name in settings.keys() & golden.keys():
    assert settings[name] == golden[name], name


@pytest.mark.parametrize(
  "case, shared, others",
  [
    ("t5", "shared", ("encoder.embed_tokens", "lm_head")),
    ("marian", "model.shared", ("model.decoder.embed_tokens", "lm_head")),
  ],
)
def test_shared_embeddings_are_read_under_each_of_their_names(case, shared, others, tmp_path):
  shared = f"{shared}.weight"
  first, second = (f"{name}.weight" for name in others)
  expected = entry(shared, (19, 12))
  write(tmp_path, case, rename=lambda name: first if name == shared else name, copies=[second])
  params = load_seq2seq(tmp_path).variables.params
  np.testing.assert_array_equal(params["embed"]["embedding"], expected)


@pytest.mark.parametrize(
  "case, options, message",
  [
    ("t5", {"drop": "encoder.final"}, "missing: encoder.final_layer_norm"),
    ("t5", {"num_decoder_layers": 1}, "unexpected: decoder.block.1"),
    ("t5", {"d_ff": 21}, "shape: params/decoder/blocks/0/down/kernel"),
    ("t5", {"scale_decoder_outputs": False}, "missing: lm_head.weight"),
    ("t5", {"model_type": "mt5"}, "^model_type"),
    ("t5", {"feed_forward_proj": "gated-silu"}, "^feed_forward_proj"),
    ("marian", {"activation_function": "gelu_new"}, "^activation_function"),
    ("marian", {"scale_embedding": False}, "^scale_embedding"),
    ("marian", {"normalize_before": True}, "^normalize_before"),
    ("marian", {"static_position_embeddings": False}, "^static_position_embeddings"),
    ("marian", {"decoder_attention_heads": 2}, "^decoder_attention_heads"),
    ("marian", {"decoder_ffn_dim": 2}, "^decoder_ffn_dim"),
    ("marian", {"eos_token_id": 19}, "^end_token"),
  ],
)
def test_checkpoint_that_does_not_fit_raises(case, options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load_seq2seq(write(tmp_path, case, **options))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_or_corrupt_file_is_named(name, tmp_path):
  file = write(tmp_path, "t5") / name
  file.write_bytes(b"{")
  with pytest.raises(ValueError, match=name):
    load_seq2seq(tmp_path)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=name):
    load_seq2seq(tmp_path)


SIZES = {"vocab_size": 9, "embed_dim": 8, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2}
TOKENS_OF = {"start_token": 0, "end_token": 1}


@pytest.mark.parametrize(
  "field, options",
  [
    ("family", {"family": "plain"}),
    ("start_token", {"family": "t5", "start_token": None}),
    ("end_token", {"family": "marian", "end_token": None}),
    ("source_vocab_size", {"family": "t5", "source_vocab_size": 5}),
    ("activation", {"family": "marian", "activation": "gated_gelu"}),
    ("head_dim", {"family": "marian", "head_dim": 3}),
    ("norm_eps", {"family": "marian", "norm_eps": 1e-6}),
    ("tie_embeddings", {"family": "marian", "source_vocab_size": 5}),
  ],
)
def test_network_that_transformers_does_not_have_is_not_written(field, options, tmp_path):
  config = EncoderDecoderConfig(**SIZES | TOKENS_OF | options)
  with pytest.raises(ValueError, match=f"^{field}"):
    save_seq2seq(tmp_path, None, config)


def test_variables_of_another_network_raise(tmp_path):
  config = EncoderDecoderConfig(**SIZES, **TOKENS_OF, family="t5")
  model = from_nnx(lambda rngs: EncoderDecoder(config, rngs=rngs))
  variables = jax.eval_shape(model.init, jax.random.key(0), {})
  with pytest.raises(ValueError, match="^variables: .*decoder/blocks/1"):
    save_seq2seq(tmp_path, variables, dataclasses.replace(config, decoder_layers=2))


def test_released_marian_never_writes_its_bad_words(tmp_path):
  folder = write(tmp_path, "marian", bad_words_ids=[[2], [5]])
  config = read_seq2seq_config(folder)
  assert config.suppressed_tokens == (2, 5)
  variables = load_seq2seq(folder).variables
  steps = decoder_steps(lambda rngs: EncoderDecoder(config, rngs=rngs))
  cache = steps.start(variables, BATCH, 1)
  logits, _ = steps.step(variables, TOKENS[:, 0], 0, cache)
  assert (np.isneginf(logits) == np.isin(np.arange(logits.shape[1]), (2, 5))).all()
  assert read_seq2seq_config(save_seq2seq(tmp_path / "written", variables, config)) == config
  write(tmp_path, "marian", bad_words_ids=[[2, 5]])
  with pytest.raises(ValueError, match="^bad_words_ids: expected"):
    read_seq2seq_config(folder)
