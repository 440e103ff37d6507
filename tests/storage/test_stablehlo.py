"""Exported programs: the same logits from jax alone, for any batch size, and nothing damaged taken for whole."""

import json
import os
import shutil
import subprocess
import sys

import flax.linen as linen
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

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
  """With batch statistics that are not the initial ones."""
  variables = model.init(KEY, batch)
  return variables._replace(state=model.apply(*variables, batch, train=True, key=KEY)[1])


def write(folder, model, variables, batch, **options):
  export_student(folder, variables, description={})
  return export_stablehlo(folder, model, variables, batch, **options)


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder, batch = tmp_path_factory.mktemp("student"), batch_of(np.random.default_rng(0), 4)
  variables = variables_of(MODEL, batch)
  write(folder, MODEL, variables, batch)
  return folder, variables


@pytest.fixture
def exported(written, tmp_path):
  """A folder of its own with the exported student, and the student's variables."""
  folder, variables = written
  return shutil.copytree(folder, tmp_path / "copy"), variables


def logits(model, variables, batch):
  return model.apply(*variables, batch, train=False, key=None)[0]["logits"]


def test_a_fresh_process_with_jax_alone_gets_the_same_logits(exported, rng):
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


def test_the_loader_gets_the_same_logits_in_evaluation_mode(exported, rng):
  folder, variables = exported
  predict = load_stablehlo(folder)
  for rows in (2, 5):
    batch = batch_of(rng, rows)
    assert_same(predict(batch), {"logits": logits(MODEL, variables, batch)})
  with pytest.raises(ValueError, match="no entry 'image'; did you mean 'images'"):
    predict({"images": batch["image"]})


def test_the_signature_says_what_goes_in_and_out(exported):
  folder, _ = exported
  signature = json.loads((folder / "model.stablehlo.json").read_text())
  assert signature["inputs"] == {"image": "float32[batch,8,8,1]"}
  assert signature["outputs"] == {"logits": "float32[batch,3]"}
  assert signature["platforms"] == ["cpu", "cuda", "tpu"]
  program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
  assert program.platforms == ("cpu", "cuda", "tpu")


def test_weights_are_no_part_of_the_program(tmp_path, rng):
  model = from_nnx(lambda rngs: MLP(64, (512, 512), 3, rngs=rngs))
  batch = batch_of(rng, 2)
  path = write(tmp_path, model, model.init(KEY, batch), batch)
  assert path.stat().st_size < 50_000 < 1_000_000 < (tmp_path / "model.safetensors").stat().st_size


def test_features_are_exported_when_asked(exported, rng):
  folder, variables = exported
  batch = batch_of(rng, 3)
  export_stablehlo(folder, MODEL, variables, batch, outputs=["embedding", "block1"])
  expected = MODEL.apply(*variables, batch, train=False, key=None)[0]
  assert_same(
    load_stablehlo(folder)(batch), {name: expected[name] for name in ("embedding", "block1")}
  )
  with pytest.raises(ValueError, match="no 'block_1'; did you mean 'block1'"):
    export_stablehlo(folder, MODEL, variables, batch, outputs=["block_1"])


class Attention(linen.Module):
  @linen.compact
  def __call__(self, image, shift):
    x = linen.MultiHeadDotProductAttention(2)(image.reshape(-1, 8, 8)) + shift[:, None, None]
    return linen.Dense(3)(linen.Dropout(0.5, deterministic=True)(x.mean(1)))


def equinox_model():
  eqx = pytest.importorskip("equinox")
  net = eqx.nn.MLP(64, 3, 8, 1, key=KEY)
  params, code = eqx.partition(net, eqx.is_inexact_array)
  return from_apply(
    None, lambda p, x: jax.vmap(eqx.combine(p, code))(x.reshape(-1, 64)), variables=params
  )


def haiku_model():
  hk = pytest.importorskip("haiku")
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(hk.Flatten()(x))))
  return from_apply(net.init, net.apply)


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
    lambda: from_linen(Attention(), inputs=("image", "shift")),
    equinox_model,
    haiku_model,
    keras_model,
  ],
  ids=["linen", "equinox", "haiku", "keras"],
)
def test_models_of_every_library(tmp_path, rng, make):
  model, batch = make(), {**batch_of(rng, 3), "shift": np.ones(3, np.float32)}
  variables = model.init(KEY, batch)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  write(tmp_path, model, variables, shapes)
  predict = load_stablehlo(tmp_path)
  for rows in (1, 3):
    part = {name: x[:rows] for name, x in batch.items()}
    assert_same(predict(part), {"logits": logits(model, variables, part)})


# What is refused


@pytest.mark.parametrize(
  "apply", [lambda w, x: w * len(x) * x[:, 0, 0], lambda w, x: x if x.shape[0] > 3 else w * x]
)
def test_a_model_that_takes_the_batch_s_size_for_a_number(tmp_path, rng, apply):
  model = from_apply(None, apply, variables=jnp.ones(()))
  with pytest.raises(ValueError, match="for a batch of any size: it takes the size for a number"):
    export_stablehlo(tmp_path, model, model.variables, batch_of(rng, 2))


def test_other_errors_of_a_model_are_its_own(tmp_path, rng):
  model = from_apply(None, lambda w, x: x.shape + w, variables=jnp.ones(()))
  with pytest.raises(TypeError, match="unsupported|add|concatenate"):
    export_stablehlo(tmp_path, model, model.variables, batch_of(rng, 2))


@pytest.mark.parametrize("name", ["model.stablehlo", "model.stablehlo.json", "model.safetensors"])
def test_missing_and_damaged_files(exported, name):
  folder, _ = exported
  content = (folder / name).read_bytes()
  middle = len(content) // 2
  flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
  for damaged in (b"", content[:-9], *([] if name.endswith("json") else [flipped])):
    (folder / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
      load_stablehlo(folder)
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=f"no {name} in"):
    load_stablehlo(folder)


def test_weights_of_another_export(exported, rng):
  folder, variables = exported
  export_student(folder, jax.tree.map(lambda x: x + 1, variables), description={})
  with pytest.raises(ValueError, match="or of another export"):
    load_stablehlo(folder)
