"""Tests released encoders, in and out, against the names and outputs of transformers."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from encoder_cases import CASES, MASK, TOKEN_TYPES, TOKENS, entry

from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.models.encoders.encoder_files import (
  load_encoder,
  read_encoder_config,
  save_encoder,
)

GOLDEN = json.loads(pathlib.Path(__file__).with_name("encoder_golden.json").read_text())
BATCH = {"tokens": TOKENS, "segments": MASK - 1, "token_types": TOKEN_TYPES}


def write(folder, case, *, rename=lambda name: name, drop=(), **changes):
  """Writes a released folder, with other names, without some entries, or with other settings."""
  golden = GOLDEN[case]
  arrays = {name: entry(name, shape) for name, shape in golden["entries"].items()}
  arrays = {rename(name): x for name, x in arrays.items() if not name.startswith(tuple(drop))}
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(golden["config"] | changes))
  return folder


def config_of(folder, case):
  config = read_encoder_config(folder)
  return dataclasses.replace(config, head="masked") if case.endswith("_masked") else config


@functools.cache
def random_variables(config):
  model = from_nnx(lambda rngs: Encoder(config, rngs=rngs))
  return model.init(jax.random.key(0), {})


def old_name(name):
  return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"
  )


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_transformers(case, tmp_path):
  folder = write(tmp_path, case)
  model = load_encoder(folder, config_of(folder, case))
  outputs = jax.jit(lambda v: model.apply(*v, BATCH, train=False, key=None)[0])(model.variables)
  actual = dict(outputs) | {"attention2": jax.nn.softmax(outputs["attention2"])}
  for name, expected in GOLDEN[case]["outputs"].items():
    value, expected = np.array(actual[name]), np.array(expected)
    if value.ndim == 3:  # [B, L, C]
      value, expected = value[MASK], expected[MASK]
    elif name == "attention2":  # [B, heads, L, L]
      value, expected = (np.moveaxis(x, 1, 2)[MASK] for x in (value, expected))
    elif name in ("start", "end"):
      value, expected = value[MASK], expected[MASK]
    np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_written_folder_has_the_names_of_transformers_and_is_read_again(case, tmp_path):
  config = config_of(write(tmp_path, case), case)
  variables = load_encoder(tmp_path, config).variables
  folder = save_encoder(tmp_path / "student", variables, config)
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  assert {name: list(x.shape) for name, x in arrays.items()} == GOLDEN[case]["entries"]
  assert config_of(folder, case) == config
  for name, value in arrays.items():
    expected = entry(name, value.shape)
    if name.endswith("position_embeddings.weight") and config.family == "roberta":
      value, expected = value[2:], expected[2:]  # Padding's.
    np.testing.assert_array_equal(value, expected)
  settings = json.loads((folder / "config.json").read_text())
  golden = GOLDEN[case]["config"]
  different = {name for name in settings.keys() & golden.keys() if settings[name] != golden[name]}
  assert {name for name in different if "dropout" not in name} <= {
    "torch_dtype",
    "problem_type",
    "pad_token_id",
  }


def test_older_names_of_norms_are_read(tmp_path):
  new = load_encoder(write(tmp_path, "bert")).variables
  old = load_encoder(write(tmp_path, "bert", rename=old_name)).variables
  jax.tree.map(np.testing.assert_array_equal, new, old)


@pytest.mark.parametrize("case", ["bert", "distilbert", "roberta", "modernbert"])
def test_new_head_starts_from_random_weights_on_the_released_encoder(case, tmp_path):
  config = read_encoder_config(write(tmp_path, case))
  with_head = dataclasses.replace(config, head="sequence", num_labels=3)
  model = load_encoder(tmp_path, with_head)
  assert model.variables is None
  params, again = (model.init(jax.random.key(seed), {}).params for seed in (0, 1))
  expected = load_encoder(tmp_path).variables.params
  jax.tree.map(np.testing.assert_array_equal, params["blocks"], expected["blocks"])
  np.testing.assert_array_equal(params["embed_norm"]["scale"], expected["embed_norm"]["scale"])
  assert (params["head"]["kernel"] != again["head"]["kernel"]).all()
  is_new = bool((params["pooler"]["kernel"] != again["pooler"]["kernel"]).all())
  assert is_new == (case != "bert")


@pytest.mark.parametrize(
  "case, options, changes, message",
  [
    ("bert", {"drop": ["encoder.layer.1.output.dense.bias"]}, {}, "missing: encoder.layer.1"),
    ("bert", {}, {"num_hidden_layers": 1}, "unexpected: encoder.layer.1"),
    ("bert", {}, {"intermediate_size": 21}, r"shape: params/blocks/0/down/kernel"),
    ("bert_sequence", {}, {"architectures": ["BertModel"]}, "unexpected: classifier.bias"),
    ("bert", {}, {"model_type": "albert"}, "^model_type"),
    ("bert", {}, {"hidden_act": "gelu_new"}, "^hidden_act"),
    ("bert", {}, {"position_embedding_type": "relative_key"}, "^position_embedding_type"),
    ("modernbert", {}, {"norm_bias": True}, "^norm_bias"),
    ("modernbert", {}, {"layer_types": ["sliding_attention"] * 4}, "^layer_types"),
  ],
)
def test_checkpoint_that_does_not_fit_raises(case, options, changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load_encoder(write(tmp_path, case, **options, **changes))


def test_heads_of_pretraining_are_left_out(tmp_path):
  folder = write(tmp_path, "bert", architectures=["BertForMaskedLM"])
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  arrays |= {
    "cls.predictions.bias": np.zeros(19, np.float32),
    "embeddings.position_ids": np.arange(16),
  }
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  assert read_encoder_config(folder).head == "" and load_encoder(folder).variables is not None


def test_variables_of_another_network_raise(tmp_path):
  config = EncoderConfig(9, 8, 1, 2)
  variables = random_variables(config)
  with pytest.raises(ValueError, match="^variables: .*blocks/1"):
    save_encoder(tmp_path, variables, dataclasses.replace(config, num_layers=2))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_or_corrupt_file_is_named(name, tmp_path):
  file = write(tmp_path, "bert") / name
  file.write_bytes(b"{")
  with pytest.raises(ValueError, match=name):
    load_encoder(tmp_path)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=name):
    load_encoder(tmp_path)


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ({}, "index.json is corrupt: .*'weight_map'"),
    ({"weight_map": {"embeddings.x": 3}}, "index.json is corrupt: .*'embeddings.x', got 3"),
  ],
)
def test_corrupt_index_is_named(index, message, tmp_path):
  file = write(tmp_path, "bert") / "model.safetensors"
  file.unlink()
  file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match=message):
    load_encoder(tmp_path)
