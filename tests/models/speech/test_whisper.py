"""Whisper, in and out, against transformers; its steps; a student with its frozen encoder."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from whisper_cases import FEATURES, GENERATION, PROMPT, TOKENS, entry

from distill_jax.models import decoding, from_nnx, shared_prefix, whole_variables
from distill_jax.models.llm.head import head_logits
from distill_jax.models.speech.whisper import INPUTS, Whisper, whisper_steps
from distill_jax.models.speech.whisper_config import WhisperConfig
from distill_jax.models.speech.whisper_files import (
  load_whisper,
  read_whisper_config,
  save_whisper,
)

GOLDEN = json.loads(pathlib.Path(__file__).with_name("whisper_golden.json").read_text())
BATCH = {"features": FEATURES, "tokens": TOKENS}


def write(folder, *, drop="-", **changes):
  """Writes a released folder, without some entries, or with other settings."""
  arrays = {k: entry(k, shape) for k, shape in GOLDEN["entries"].items() if not k.startswith(drop)}
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(GOLDEN["config"] | changes))
  (folder / "generation_config.json").write_text(json.dumps(GENERATION))
  return folder


@functools.cache
def released(folder):
  return load_whisper(write(folder)), read_whisper_config(folder)


def test_outputs_steps_and_written_folder_equal_those_of_transformers(tmp_path):
  model, config = released(tmp_path)
  steps = whisper_steps(lambda rngs: Whisper(config, rngs=rngs), prompt=PROMPT)

  @jax.jit
  def run(variables):
    outputs = model.apply(*variables, BATCH, train=False, key=None)[0]

    def step(cache, now):
      logits, cache = steps.step(variables, *now, cache)
      return cache, logits

    columns = TOKENS[:, 1:].T, jnp.arange(5)
    cache = steps.start(variables, {"features": FEATURES}, 5)
    _, logits = jax.lax.scan(step, cache, columns)
    spoken = decoding.sampler(steps, max_length=6)(variables, None, {"features": FEATURES})
    return {**outputs, "logits": head_logits(outputs)}, jnp.moveaxis(logits, 0, 1), spoken

  outputs, logits, (spoken, _) = run(model.variables)
  assert (steps.start_token, steps.end_token, steps.max_length) == (4, 18, 9)
  allowed = np.array(outputs["logits"][:, 1:])
  allowed[..., GENERATION["suppress_tokens"]] = -np.inf
  allowed[:, 0, GENERATION["begin_suppress_tokens"]] = -np.inf
  np.testing.assert_allclose(logits, allowed, atol=1e-5)
  assert spoken.tolist() == GOLDEN["generated"]
  for name, values in GOLDEN["outputs"].items():
    actual = jax.nn.softmax(outputs[name]) if "attention" in name else outputs[name]
    np.testing.assert_allclose(actual, np.array(values), atol=5e-5, err_msg=name)

  folder = save_whisper(tmp_path / "student", model.variables, config)
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  assert {name: list(x.shape) for name, x in arrays.items()} == GOLDEN["entries"]
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, entry(name, value.shape))
  assert read_whisper_config(folder) == config
  settings = json.loads((folder / "config.json").read_text())
  for name in settings.keys() & GOLDEN["config"].keys():
    assert settings[name] == GOLDEN["config"][name], name
  # What a release tells besides stays.
  generation = folder / "generation_config.json"
  written = json.loads(generation.read_text()) | {"lang_to_id": {"<|de|>": 3}}
  generation.write_text(json.dumps(written))
  save_whisper(folder, model.variables, dataclasses.replace(config, suppressed_tokens=[5]))
  assert json.loads(generation.read_text()) == written | {"suppress_tokens": [5]}
  # Files of older versions have the suppressed tokens there, some outside of a small vocabulary.
  generation.unlink()
  settings |= {name: [*GENERATION[name], 50256] for name in GENERATION if "suppress" in name}
  (folder / "config.json").write_text(json.dumps(settings))
  assert read_whisper_config(folder) == config


@pytest.mark.slow
def test_student_shares_the_frozen_encoder(tmp_path):
  teacher, config = released(tmp_path)
  small = dataclasses.replace(config, decoder_layers=1)
  whole = from_nnx(lambda rngs: Whisper(small, rngs=rngs), inputs=INPUTS)
  rest = from_nnx(
    lambda rngs: Whisper(small, rngs=rngs),
    inputs=("encoded", "tokens"),
    call=lambda network, encoded, tokens, train: network.decode(tokens, encoded),
  )
  student = shared_prefix(whole, teacher, "^encoder/", rest=rest)
  variables = student.init(jax.random.key(0), BATCH)
  assert not jax.tree.leaves(variables.params["encoder"])
  encoder = teacher.variables.params["encoder"]
  jax.tree.map(np.testing.assert_array_equal, whole_variables(variables).params["encoder"], encoder)

  @jax.jit
  def run(encoded):
    batch = BATCH | {"teacher/encoded": encoded}
    shared = student.apply(*variables, batch, train=True, key=None)[0]
    own = student.apply(*variables, BATCH, train=False, key=None)[0]
    return own["encoded"], own["hidden"], shared["hidden"]

  own, hidden, _ = run(jnp.zeros((2, 8, 12)))
  np.testing.assert_allclose(own, np.array(GOLDEN["outputs"]["encoded"]), atol=5e-5)
  np.testing.assert_allclose(run(own)[2], hidden, atol=1e-5)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"drop": "model.encoder.layer_norm"}, "missing: model.encoder.layer_norm"),
    ({"decoder_layers": 1}, "unexpected: model.decoder.layers.1"),
    ({"max_source_positions": 9}, "shape: params/encoder/positions"),
    ({"model_type": "t5"}, "^model_type"),
    ({"activation_function": "relu"}, "^activation_function"),
    ({"scale_embedding": True}, "^scale_embedding"),
    ({"decoder_ffn_dim": 2}, "^decoder_ffn_dim"),
    ({"eos_token_id": 19}, "^end_token"),
  ],
)
def test_whisper_that_does_not_fit_raises(options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load_whisper(write(tmp_path, **options))


@pytest.mark.parametrize(
  "field, options, shape, length",
  [
    ("features", {}, (2, 17, 5), 3),
    ("features", {}, (2, 16, 4), 3),
    ("tokens", {}, (2, 16, 5), 11),
    ("end_token", {"end_token": 19}, (2, 16, 5), 3),
    ("prompt", {"prompt": ()}, (2, 16, 5), 3),
    ("prompt", {"prompt": (19,)}, (2, 16, 5), 3),
  ],
)
def test_whisper_errors_name_the_field(field, options, shape, length):
  config = WhisperConfig(
    19, 12, 1, 1, num_heads=3, num_features=5, source_length=8, max_length=10, end_token=1
  )
  with pytest.raises(ValueError, match=f"^{field}:"):
    if options:
      whisper_steps(lambda rngs: Whisper(config, rngs=rngs), **({"prompt": (0,)} | options))
    model = from_nnx(lambda rngs: Whisper(config, rngs=rngs), inputs=INPUTS)
    batch = {"features": jnp.zeros(shape), "tokens": jnp.zeros((2, length), int)}
    variables = jax.eval_shape(model.init, jax.random.key(0), {})
    jax.eval_shape(lambda v: model.apply(*v, batch, train=False, key=None)[0], variables)
