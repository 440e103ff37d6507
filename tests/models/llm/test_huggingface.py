"""Tests released checkpoints against the outputs of transformers."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from decoder_files import FAMILIES, TOKENS, weights

from distill_jax.models import from_nnx, load_weights, pretrained
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.llm.head import head_logits
from distill_jax.models.llm.huggingface import decoder_arguments, decoder_name
from distill_jax.models.llm.sampling import Generator

GOLDEN = json.loads(pathlib.Path(__file__).with_name("decoder_golden.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_greedy_text_equal_those_of_transformers(family, tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(weights(family), path)
  golden = GOLDEN[family]
  arguments = decoder_arguments(golden["config"])
  make = lambda rngs: Decoder(**arguments, rngs=rngs)  # noqa: E731
  model = pretrained(from_nnx(make, inputs="tokens"), path, {}, names=decoder_name)

  run = jax.jit(lambda v, t: model.apply(*v, {"tokens": t}, train=False, key=None)[0])
  outputs = run(model.variables, TOKENS[:1])
  actual = {name: outputs[name] for name in ("block1", "hidden")}
  actual |= {"logits": head_logits(outputs)}
  actual["attention2"] = jax.nn.softmax(outputs["attention2"])[:, :, -1]
  for name, value in actual.items():
    expected = np.array(golden[name])
    tolerance = 3e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(value[0], expected, atol=tolerance, err_msg=name)

  text = Generator(make)(model.variables.params, TOKENS.tolist(), 8)
  assert [row[24:] for row in text] == golden["greedy"]
  assert [row[:24] for row in text] == TOKENS.tolist()


def test_checkpoint_of_another_model_raises(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(weights("qwen3"), path)
  arguments = decoder_arguments(GOLDEN["llama"]["config"])
  model = from_nnx(lambda rngs: Decoder(**arguments, rngs=rngs))
  like = jax.eval_shape(model.init, jax.random.key(0), {})
  with pytest.raises(ValueError, match="unexpected: model.layers.0.self_attn.k_norm.weight"):
    load_weights(path, like, names=decoder_name)


@pytest.mark.parametrize(
  "change, field",
  [
    ({"model_type": "gemma2"}, "model_type"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type"),
  ],
)
def test_unsupported_configuration_raises(change, field):
  with pytest.raises(ValueError, match=rf"^{field}"):
    decoder_arguments({**GOLDEN["llama"]["config"], **change})


def test_older_configuration_gives_the_same_arguments():
  config = dict(GOLDEN["llama"]["config"])
  rope = dict(config.pop("rope_parameters"))
  config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
  assert decoder_arguments(config) == decoder_arguments(GOLDEN["llama"]["config"])
