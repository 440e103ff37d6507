"""Tests a released vision transformer, in and out, against transformers' names and outputs."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from make_vit_golden import IMAGES, entry

from distill_jax.models import from_nnx, pretrained, save_weights
from distill_jax.models.zoo.vit import ViT
from distill_jax.models.zoo.vit_names import released_vit_names, vit_arguments, vit_name

GOLDEN = json.loads(pathlib.Path(__file__).with_name("vit_golden.json").read_text())
ENTRIES = {name: entry(name, shape) for name, shape in GOLDEN["entries"].items()}


def load(path):
  arguments = vit_arguments(GOLDEN["config"])
  model = from_nnx(lambda rngs: ViT(**arguments, rngs=rngs))
  return pretrained(model, path, {}, names=vit_name)


def test_outputs_equal_those_of_transformers(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(ENTRIES, path)
  model = load(path)
  run = jax.jit(lambda v: model.apply(*v, {"image": IMAGES}, train=False, key=None)[0])
  outputs = run(model.variables)
  for name, expected in GOLDEN["outputs"].items():
    np.testing.assert_allclose(outputs[name], expected, atol=1e-4, err_msg=name)


def test_written_file_has_the_entries_of_transformers(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(ENTRIES, path)
  variables = load(path).variables
  save_weights(path, variables, names=released_vit_names(channels=2, patch=4))
  arrays = safetensors.numpy.load_file(path)
  assert arrays.keys() == ENTRIES.keys()
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, ENTRIES[name])


@pytest.mark.parametrize(
  "change", [{"model_type": "deit"}, {"hidden_act": "relu"}, {"qkv_bias": False}]
)
def test_unsupported_configuration_raises(change):
  with pytest.raises(ValueError, match=f"^{next(iter(change))}"):
    vit_arguments({**GOLDEN["config"], **change})
