"""Tests that an exported student knows what it was trained on, and notices other inputs."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data
from distill_jax.models import from_apply
from distill_jax.storage.inputs import check_inputs, describe_inputs
from distill_jax.storage.stablehlo import export_stablehlo, load_stablehlo
from distill_jax.storage.student import DESCRIPTION, export_student, load_student, read_inputs

RNG = np.random.default_rng(0)
IMAGES = RNG.random((32, 6, 5, 3), np.float32)
SOURCE = data.Source(
  {"image": IMAGES, "tokens": np.arange(64).reshape(32, 2), "label": np.arange(32) % 2},
  classes=2,
  class_names=("cat", "dog"),
)
INPUTS = describe_inputs(SOURCE)


def apply(params, image):
  return image.mean((1, 2)) @ params["w"]


MODEL = from_apply(None, apply, variables={"w": np.ones((3, 2), np.float32)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("student")
  export_student(MODEL.variables, folder, description={}, inputs=INPUTS)
  export_stablehlo(MODEL, MODEL.variables, {"image": IMAGES[:1]}, folder, platforms=("cpu",))
  return folder


def test_description_holds_shape_dtype_range_and_classes(folder):
  stored = read_inputs(folder)
  assert stored["class_names"] == ["cat", "dog"]
  assert sorted(stored["entries"]) == ["image", "tokens"]
  image = stored["entries"]["image"]
  assert image["shape"] == [6, 5, 3] and image["dtype"] == "float32"
  assert (image["min"], image["max"]) == (float(IMAGES.min()), float(IMAGES.max()))
  assert stored == json.loads(json.dumps(INPUTS))


FAULTS = {
  "0 to 255": (IMAGES * 255, UserWarning, "image: .*0.* to 0.99.*255"),
  "0 to 1/255": (IMAGES / 255, UserWarning, "image: "),
  "uint8": ((IMAGES * 255).astype(np.uint8), ValueError, "image: .*float32.*uint8"),
  "channels first": (np.moveaxis(IMAGES, -1, 1), ValueError, r"image: .*moveaxis\(image, 1, -1\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_inputs_that_were_prepared_otherwise_are_noticed(folder, fault):
  images, kind, match = FAULTS[fault]
  predict = load_stablehlo(folder)
  for check in (
    lambda batch: predict(batch),
    lambda batch: load_student(folder, MODEL, batch),
    lambda batch: check_inputs(INPUTS, batch),
  ):
    expected = pytest.warns if kind is UserWarning else pytest.raises
    with expected(kind, match=f"^{match}"):
      check({"image": images})


def test_inputs_as_in_training_pass(folder):
  predict = load_stablehlo(folder)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for rows in (slice(1), slice(None)):
      batch = {"image": IMAGES[rows], "id": np.arange(32)[rows]}
      expected = np.asarray(apply(MODEL.variables.params, jnp.asarray(batch["image"])))
      np.testing.assert_allclose(predict(batch)["logits"], expected, rtol=1e-6)
      load_student(folder, MODEL, batch)
    predict({"image": np.zeros((1, 6, 5, 3), np.float32)})  # A black image has no range.
    predict({"image": IMAGES.astype(np.float64)})
    load_student(folder, MODEL, {"image": jax.ShapeDtypeStruct((1, 6, 5, 3), jnp.float32)})


@pytest.mark.parametrize(
  ("values", "match"),
  [
    (np.zeros((2, 9, 5, 3), np.float32), r"image: .*6,5,3.*9,5,3"),
    (np.zeros((6, 5, 3), np.float32), r"image: .*6,5,3"),
    (np.zeros((2, 6, 5, 3), np.float16), "image: .*float32.*float16"),
  ],
)
def test_program_names_an_input_of_another_shape(folder, values, match):
  with pytest.raises(ValueError, match=f"^{match}"):
    load_stablehlo(folder)({"image": values})


def test_student_warns_of_another_size_that_its_network_takes(folder):
  with pytest.warns(UserWarning, match=r"^image: .*\[6, 5, 3\].*\[9, 9, 3\]"):
    load_student(folder, MODEL, {"image": np.zeros((1, 9, 9, 3), np.float32)})


def flat(params, image):
  return image.reshape(len(image), -1) @ params["w"]


FLAT = from_apply(None, flat, variables={"w": np.ones((90, 2), np.float32)})
OTHER_BATCHES = {
  "flat rows": ({"image": IMAGES.reshape(32, -1)}, "image: .*[90]"),
  "another size": ({"image": IMAGES[:, :5]}, "image: .*[5, 5, 3]"),
  "shapes": ({"image": jax.ShapeDtypeStruct((1, 90), jnp.float32)}, "image: .*[90]"),
  "another name": ({"x": IMAGES}, "image: .*['x']"),
  "no entry": ({}, "image: .*[]"),
}


@pytest.mark.parametrize("name", OTHER_BATCHES)
def test_student_rejects_entries_unlike_the_trained_ones(tmp_path, name):
  batch, match = OTHER_BATCHES[name]
  export_student(FLAT.variables, tmp_path, description={}, inputs=INPUTS)
  with pytest.raises(ValueError, match="^" + match.replace("[", r"\[").replace("]", r"\]")):
    load_student(tmp_path, FLAT, batch)
  load_student(tmp_path, FLAT, {"image": IMAGES})


@pytest.mark.parametrize("inputs", [SOURCE, {"image": IMAGES}, ["image"]])
def test_export_names_what_describes_inputs(tmp_path, inputs):
  with pytest.raises(ValueError, match=r"^inputs: .*describe_inputs\("):
    export_student(MODEL.variables, tmp_path, description={}, inputs=inputs)
  assert not list(tmp_path.iterdir())


def test_student_without_inputs_checks_none(folder, tmp_path):
  export_student(MODEL.variables, tmp_path, description={})
  assert read_inputs(tmp_path) == {}
  load_student(tmp_path, MODEL, {"image": IMAGES * 255})
  (tmp_path / DESCRIPTION).write_text("{")
  with pytest.raises(ValueError, match="corrupt"):
    read_inputs(tmp_path)


def test_corrected_bias_is_exported_without_training(folder, tmp_path):
  variables = load_student(folder, MODEL)
  params = {"w": variables.params["w"] + jnp.array([0.0, 1.0])}
  corrected = variables._replace(params=params)
  export_student(corrected, tmp_path, description={}, inputs=read_inputs(folder))
  export_stablehlo(MODEL, corrected, {"image": IMAGES[:1]}, tmp_path, platforms=("cpu",))
  logits = load_stablehlo(tmp_path)({"image": IMAGES})["logits"]
  np.testing.assert_allclose(logits, IMAGES.mean((1, 2)) @ np.asarray(params["w"]), rtol=1e-5)
