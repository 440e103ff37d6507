"""Exported programs return the same logits with jax only, for any batch size."""

import json
import os
import re
import shutil
import subprocess
import sys

import flax.linen as linen
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import models
from distill_jax.models import from_apply, from_linen, from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.storage.stablehlo import export_stablehlo, load_stablehlo
from distill_jax.storage.student import export_student

MODEL = from_nnx(lambda rngs: CNN(1, (4, 6), 3, rngs=rngs))
KEY = jax.random.key(0)


def batch_of(rng, rows, shape=(8, 8, 1)):
  return {
    "id": np.arange(rows),
    "image": rng.normal(size=(rows, *shape)).astype(np.float32),
    "label": np.zeros(rows, np.int32),
    "where": np.ones(rows, bool),
  }


def variables_of(model, batch):
  """Returns variables with batch statistics that are not the initial ones."""

  @jax.jit
  def run(key):
    variables = model.init(key, batch)
    return variables._replace(state=model.apply(*variables, batch, train=True, key=key)[1])

  return run(KEY)


def write(folder, model, variables, batch, **options):
  export_student(variables, folder, description={})
  return export_stablehlo(model, variables, batch, folder, **options)


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder, batch = tmp_path_factory.mktemp("student"), batch_of(np.random.default_rng(0), 4)
  variables = variables_of(MODEL, batch)
  write(folder, MODEL, variables, batch, outputs=["logits"])
  return folder, variables


@pytest.fixture
def exported(written, tmp_path):
  """A copy of the folder with the exported student, and the student's variables."""
  folder, variables = written
  return shutil.copytree(folder, tmp_path / "copy"), variables


def logits(model, variables, batch):
  predict = jax.jit(lambda v, batch: model.apply(*v, batch, train=False, key=None)[0]["logits"])
  return predict(variables, batch)


def test_fresh_process_with_only_jax_returns_the_same_logits(exported, rng):
  folder, variables = exported
  for rows in (1, 7):
    batch = batch_of(rng, rows)
    np.save(folder / f"image{rows}.npy", batch["image"])
    np.save(folder / f"logits{rows}.npy", logits(MODEL, variables, batch))
  code = """
import sys
for name in "flax optax orbax grain tensorflow keras distill_jax".split(): sys.modules[name] = None
import jax, jax.export, numpy as np, safetensors.numpy
weights = safetensors.numpy.load_file("model.safetensors")
program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
for rows in (1, 7):
  got = jax.jit(program.call)(weights, {"image": np.load(f"image{rows}.npy")})
  assert got.keys() == {"logits"}, got.keys()
  np.testing.assert_allclose(got["logits"], np.load(f"logits{rows}.npy"), rtol=1e-5, atol=1e-5)
print("same")
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
  assert done.stdout == "same\n", done.stderr


def test_loader_returns_the_logits_of_evaluation_mode(exported, rng):
  folder, variables = exported
  predict = load_stablehlo(folder)
  batch = batch_of(rng, 7)
  assert_same(predict(batch), {"logits": logits(MODEL, variables, batch)})
  with pytest.raises(ValueError, match=r"batch: .*'image'"):
    predict({"images": batch["image"]})


def test_signature_holds_inputs_outputs_and_platforms(exported):
  folder, _ = exported
  signature = json.loads((folder / "model.stablehlo.json").read_text())
  assert signature["inputs"] == {"image": "float32[batch,8,8,1]"}
  assert signature["outputs"] == {"logits": "float32[batch,3]"}
  assert signature["platforms"] == ["cpu", "cuda", "tpu"]
  program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
  assert program.platforms == ("cpu", "cuda", "tpu")


def test_program_does_not_contain_the_weights(tmp_path, rng):
  model = from_nnx(lambda rngs: MLP(64, (512, 512), 3, rngs=rngs))
  batch = batch_of(rng, 2)
  path = write(tmp_path, model, model.init(KEY, batch), batch)
  weights = 4 * 512 * 512
  assert path.stat().st_size < weights / 20
  assert (tmp_path / "model.safetensors").stat().st_size > weights


def test_features_can_be_exported(exported, rng):
  folder, variables = exported
  batch = batch_of(rng, 3)
  export_stablehlo(MODEL, variables, batch, folder, outputs=["embedding", "block1"])
  expected = MODEL.apply(*variables, batch, train=False, key=None)[0]
  assert_same(
    load_stablehlo(folder)(batch), {name: expected[name] for name in ("embedding", "block1")}
  )
  with pytest.raises(ValueError, match=r"outputs: .*'block1'"):
    export_stablehlo(MODEL, variables, batch, folder, outputs=["block_1"])


def test_program_returns_every_head(tmp_path, rng):
  def apply(w, x):
    rows = x.reshape(x.shape[0], -1)
    heads = {"logits": rows[:, :3] * w, "kind": rows[:, :2] - w}
    return {**heads, "scale": w, "head": (w, None, 2.0)}

  model, batch = from_apply(None, apply, variables=jnp.full((1,), 2.0)), batch_of(rng, 2)
  write(tmp_path, model, model.variables, batch, platforms=("cpu",))
  rows = batch["image"].reshape(2, -1)
  expected = {"logits": rows[:, :3] * 2, "kind": rows[:, :2] - 2}
  assert_same(load_stablehlo(tmp_path)(batch), expected)


class Attention(linen.Module):
  @linen.compact
  def __call__(self, image, shift):
    x = linen.MultiHeadDotProductAttention(2)(image.reshape(-1, 8, 8)) + shift[:, None, None]
    return linen.Dense(3)(linen.Dropout(0.5, deterministic=True)(x.mean(1)))


def equinox_model():
  eqx = pytest.importorskip("equinox")
  flatten = eqx.nn.Lambda(jnp.ravel)
  return models.from_equinox(eqx.nn.Sequential([flatten, eqx.nn.MLP(64, 3, 8, 1, key=KEY)]))


def haiku_model():
  hk = pytest.importorskip("haiku")
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(hk.Flatten()(x))))
  return models.from_haiku(net)


def keras_model():
  os.environ.setdefault("KERAS_BACKEND", "jax")
  keras = pytest.importorskip("keras")
  from distill_jax.models import from_keras

  layers = keras.layers
  x = keras.Input((8, 8, 1))
  y = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(x))
  y = layers.Dropout(0.5)(layers.MaxPooling2D()(layers.ReLU()(y)))
  return from_keras(keras.Model(x, layers.Dense(3)(layers.Flatten()(y))))


@pytest.mark.parametrize(
  "make",
  [
    pytest.param(lambda: from_linen(Attention(), inputs=("image", "shift")), id="linen"),
    pytest.param(equinox_model, id="equinox"),
    pytest.param(haiku_model, id="haiku", marks=pytest.mark.integration),
    pytest.param(keras_model, id="keras", marks=pytest.mark.integration),
  ],
)
def test_models_of_every_library_can_be_exported(tmp_path, rng, make):
  model = make()
  batch = {**batch_of(rng, 3), "shift": np.ones(3, np.float32)}
  variables = jax.jit(model.init)(KEY, batch)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  write(tmp_path, model, variables, shapes)
  one_row = {name: x[:1] for name, x in batch.items()}
  expected = {"logits": logits(model, variables, one_row)}
  assert_same(load_stablehlo(tmp_path)(one_row), expected)


@pytest.mark.parametrize(
  "apply", [lambda w, x: w * len(x) * x[:, 0, 0], lambda w, x: x if x.shape[0] > 3 else w * x]
)
def test_model_that_uses_the_batch_size_as_a_number_raises(tmp_path, rng, apply):
  model = from_apply(None, apply, variables=jnp.ones(()))
  with pytest.raises(ValueError, match=r"^model: "):
    export_stablehlo(model, model.variables, batch_of(rng, 2), tmp_path)


def test_other_errors_of_a_model_are_not_changed(tmp_path, rng):
  model = from_apply(None, lambda w, x: x.shape + w, variables=jnp.ones(()))
  with pytest.raises(TypeError, match=r"^(?!model: )"):
    export_stablehlo(model, model.variables, batch_of(rng, 2), tmp_path)


@pytest.mark.parametrize("name", ["model.stablehlo", "model.stablehlo.json", "model.safetensors"])
def test_missing_and_corrupt_files_raise(exported, name):
  folder, _ = exported
  content = (folder / name).read_bytes()
  middle = len(content) // 2
  flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
  for corrupt in (b"", content[:-9], *([] if name.endswith("json") else [flipped])):
    (folder / name).write_bytes(corrupt)
    with pytest.raises(ValueError, match=re.escape(name)):
      load_stablehlo(folder)
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    load_stablehlo(folder)


def test_weights_of_another_export_raise(exported, rng):
  folder, variables = exported
  export_student(jax.tree.map(lambda x: x + 1, variables), folder, description={})
  with pytest.raises(ValueError, match=r"fingerprint"):
    load_stablehlo(folder)
