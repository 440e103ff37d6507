"""Tests teachers in ONNX files against onnxruntime itself, and a released recognizer of text."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import onnx_files
import pytest

from distill_jax import cache, teachers

onnxruntime = pytest.importorskip("onnxruntime")

FEATURES, CLASSES = 12, 5
KERNEL = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
LINEAR = dict(inputs={"x": "image"}, outputs={"logits": "y"})


@pytest.fixture
def arrays(rng):
  return {"image": rng.normal(size=(50, FEATURES)).astype(np.float32), "label": np.arange(50) % 5}


@pytest.fixture
def linear(tmp_path):
  path = tmp_path / "linear.onnx"
  path.write_bytes(onnx_files.linear(KERNEL))
  return path


def apply(teacher, batch):
  outputs, _ = teacher.apply(*teacher.variables, batch, train=False, key=None)
  return jax.device_get(outputs)


def run(path, outputs, **feeds):
  return onnxruntime.InferenceSession(str(path)).run(outputs, feeds)


def written(folder, teacher, source, outputs, batch_size=16):
  return cache.write_cache(folder, teacher, source, outputs, batch_size=batch_size, progress=False)


def identity_of(path, **options):
  return teachers.onnx(path, **LINEAR, **options).variables.state["identity"].tobytes()


def test_cached_rows_equal_onnxruntime(tmp_path, linear, arrays):
  teacher = teachers.onnx(linear, inputs={"x": "image"}, outputs={"hidden": "twice", "logits": "y"})
  codecs = {name: cache.Dense("float32") for name in ("logits", "hidden")}
  outputs = written(tmp_path / "cache", teacher, arrays, codecs)
  rows = outputs.add_columns({"id": np.arange(50)})
  logits, hidden = run(linear, ["y", "twice"], x=arrays["image"])
  np.testing.assert_array_equal(rows["teacher/logits.values"], logits)
  np.testing.assert_array_equal(rows["teacher/hidden.values"], hidden)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_network_of_a_fixed_batch_gets_all_rows(tmp_path, arrays, rows):
  path = tmp_path / "fixed.onnx"
  path.write_bytes(onnx_files.linear(KERNEL, rows=rows))
  logits = apply(teachers.onnx(path, **LINEAR), arrays)["logits"]
  np.testing.assert_allclose(logits, arrays["image"] @ KERNEL, atol=1e-5)


def test_images_are_transposed_and_probabilities_become_logits(tmp_path, rng):
  path = tmp_path / "images.onnx"
  nodes = [
    onnx_files.node("GlobalAveragePool", ["x"], ["mean"]),
    onnx_files.node("Flatten", ["mean"], ["flat"]),
    onnx_files.node("Softmax", ["flat"], ["p"]),
  ]
  inputs, outputs = [("x", "float32", ["N", 3, 4, 6])], [("p", "float32", ["N", 3])]
  path.write_bytes(onnx_files.model(nodes, inputs, outputs))
  images = rng.normal(size=(20, 4, 6, 3)).astype(np.float32)
  options = dict(inputs={"x": "image"}, outputs={"logits": "p"})
  teacher = teachers.onnx(
    path,
    **options,
    preprocess=lambda batch: {"image": batch["image"].transpose(0, 3, 1, 2)},
    postprocess=lambda outputs: {"logits": np.log(outputs["logits"])},
  )
  cached = written(
    tmp_path / "cache", teacher, {"image": images}, {"logits": cache.Dense("float32")}
  )
  means = images.mean((1, 2))
  expected = means - np.log(np.exp(means).sum(-1, keepdims=True))
  rows = cached.add_columns({"id": np.arange(20)})["teacher/logits.values"]
  np.testing.assert_allclose(rows, expected, atol=1e-5)
  with pytest.raises(ValueError, match=r"float32\[N,3,4,6\].*'image' with float32\[2,4,6,3\]"):
    apply(teachers.onnx(path, **options), {"image": images})


def test_tokens_are_widened_to_the_networks_integers(tmp_path):
  path = tmp_path / "tokens.onnx"
  nodes = [onnx_files.node("Gather", ["table", "tokens"], ["y"])]
  tensors = [onnx_files.tensor("table", KERNEL)]
  inputs, outputs = [("tokens", "int64", ["N", "T"])], [("y", "float32", ["N", "T", CLASSES])]
  path.write_bytes(onnx_files.model(nodes, inputs, outputs, tensors))
  teacher = teachers.onnx(path, inputs={"tokens": "tokens"}, outputs={"logits": "y"})
  for length in (3, 7):
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) % FEATURES
    np.testing.assert_array_equal(apply(teacher, {"tokens": tokens})["logits"], KERNEL[tokens])
  with pytest.raises(ValueError, match=r"expected int64\[N,T\], got .* float32\[2,3\]"):
    apply(teacher, {"tokens": np.zeros((2, 3), np.float32)})


def test_bytes_do_not_become_floats_by_themselves(linear):
  with pytest.raises(ValueError, match=r"expected float32\[N,12\], got .*uint8\[2,12\]"):
    apply(teachers.onnx(linear, **LINEAR), {"image": np.zeros((4, FEATURES), np.uint8)})


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"inputs": {"X": "image"}}, r"inputs: expected one .*got 'X'.*'x'"),
    ({"inputs": "x"}, "inputs: expected a mapping"),
    ({"outputs": ["y"]}, "outputs: expected a mapping"),
    ({"inputs": {}}, r"inputs: expected some of .*\['x'\], got none"),
    ({"outputs": {"logits": "twic"}}, r"outputs: .*got 'twic'; did you mean 'twice'"),
    ({"outputs": {}}, r"outputs: expected some of .*'twice', 'y'"),
    ({"inputs": {"x": "imag"}}, r"expected an entry of the batch, got 'imag'.*'image'"),
    ({"preprocess": lambda batch: {}}, r"preprocess: expected a dict with 'image'"),
    ({"preprocess": lambda batch: None}, r"preprocess: expected a dict .*got a NoneType"),
    ({"postprocess": lambda outputs: {"y": outputs["logits"].T}}, r"expected 2 rows in 'y'"),
    (
      {"postprocess": lambda outputs: {"y": outputs["logits"].astype(np.float64)}},
      r"got float64 as 'y'",
    ),
  ],
)
def test_what_does_not_fit_is_named(linear, arrays, change, error):
  with pytest.raises(ValueError, match=error):
    apply(teachers.onnx(linear, **{**LINEAR, **change}), arrays)


def test_each_input_needs_an_entry(tmp_path):
  path = tmp_path / "sum.onnx"
  inputs = [(name, "float32", ["N", 2]) for name in "ab"]
  nodes = [onnx_files.node("Add", ["a", "b"], ["y"])]
  path.write_bytes(onnx_files.model(nodes, inputs, [("y", "float32", ["N", 2])]))
  with pytest.raises(ValueError, match=r"inputs: .*got none for \['b'\]"):
    teachers.onnx(path, inputs={"a": "image"}, outputs={"logits": "y"})
  teacher = teachers.onnx(path, inputs={"a": "p", "b": "q"}, outputs={"logits": "y"})
  batch = {"p": np.ones((3, 2), np.float32), "q": np.full((3, 2), 2, np.float32)}
  np.testing.assert_array_equal(apply(teacher, batch)["logits"], np.full((3, 2), 3))


def custom_operator():
  inputs, outputs = [("x", "float32", ["N", 2])], [("y", "float32", ["N", 2])]
  return onnx_files.model([onnx_files.node("Magic", ["x"], ["y"], "my.ops")], inputs, outputs)


def newer_opset():
  opset, newer = (onnx_files.field(8, onnx_files.field(2, number)) for number in (13, 99))
  return onnx_files.linear(KERNEL).replace(opset, newer)


@pytest.mark.parametrize(
  ("content", "error"),
  [
    (b"no ONNX file", "broken.onnx.* pass the path"),
    (b"", "broken.onnx.* pass the path"),
    (onnx_files.linear(KERNEL)[:-200], "broken.onnx"),
    (custom_operator(), "my.ops:Magic.*register_custom_ops_library"),
    (newer_opset(), "broken.onnx with ONNX Runtime .*99.* newer onnxruntime"),
  ],
  ids=["text", "empty", "cut", "custom operator", "newer opset"],
)
def test_files_that_cannot_run_are_named(tmp_path, content, error):
  path = tmp_path / "broken.onnx"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"path: expected .*{error}"):
    teachers.onnx(path, **LINEAR)


def test_weights_in_other_files_belong_to_the_identity(tmp_path):
  location = f"{'long' * 40}.bin"  # a size of two bytes
  path, weights = tmp_path / "model.onnx", tmp_path / location
  path.write_bytes(onnx_files.linear(KERNEL, location=location))
  with pytest.raises(FileNotFoundError, match=f"path: .*{location}"):
    teachers.onnx(path, **LINEAR)
  weights.write_bytes(KERNEL.tobytes())
  image = np.ones((2, FEATURES), np.float32)
  before = identity_of(path)
  np.testing.assert_allclose(
    apply(teachers.onnx(path, **LINEAR), {"image": image})["logits"], image @ KERNEL, atol=1e-5
  )
  weights.write_bytes((2 * KERNEL).tobytes())
  assert identity_of(path) != before
  assert identity_of(path, identity="a name") == identity_of(path, identity="a name")
  with pytest.raises(FileNotFoundError, match=r"path: expected an ONNX file, got .*none\.onnx"):
    teachers.onnx(tmp_path / "none.onnx", **LINEAR)


def test_identity_is_the_file(tmp_path, linear):
  copy = tmp_path / "copy.onnx"
  copy.write_bytes(linear.read_bytes())
  assert identity_of(copy) == identity_of(linear)
  copy.write_bytes(onnx_files.linear(KERNEL + 1))
  assert identity_of(copy) != identity_of(linear)


def recognizer():
  """Returns the file of a released recognizer of text, whose package needs no import."""
  spec = importlib.util.find_spec("rapidocr_onnxruntime")
  if spec is None:
    pytest.skip("rapidocr-onnxruntime is not installed: pip install --no-deps rapidocr-onnxruntime")
  (folder,) = spec.submodule_search_locations
  return Path(folder) / "models" / "ch_PP-OCRv4_rec_infer.onnx"


@pytest.mark.integration
def test_released_recognizer_fills_a_cache(tmp_path, rng):
  path = recognizer()
  session = onnxruntime.InferenceSession(str(path))
  (entry,), (output,) = session.get_inputs(), session.get_outputs()
  images = rng.uniform(-1, 1, (6, 48, 320, 3)).astype(np.float32)
  options = dict(
    inputs={entry.name: "image"},
    preprocess=lambda batch: {"image": batch["image"].transpose(0, 3, 1, 2)},
  )
  teacher = teachers.onnx(path, outputs={"probabilities": output.name}, **options)
  dense = {"probabilities": cache.Dense("float32")}
  dense = written(tmp_path / "dense", teacher, {"image": images}, dense, batch_size=8)
  (expected,) = session.run(None, {entry.name: images.transpose(0, 3, 1, 2)})
  assert expected.shape == (6, 40, 6625)
  rows = dense.add_columns({"id": np.arange(6)})
  np.testing.assert_array_equal(rows["teacher/probabilities.values"], expected)

  def log(outputs):
    return {"logits": np.log(np.maximum(outputs["logits"], 1e-30))}

  teacher = teachers.onnx(path, outputs={"logits": output.name}, postprocess=log, **options)
  top = {"logits": cache.TopK(8)}
  top = written(tmp_path / "top", teacher, {"image": images}, top, batch_size=8)
  decoded = top.decode("logits", top.add_columns({"id": np.arange(6)}))
  highest = np.take_along_axis(expected, np.asarray(decoded.indices), -1)
  np.testing.assert_array_equal(highest[..., 0], expected.max(-1))
  # Log-probabilities of the softmax over all 6,625 classes, stored in float16.
  np.testing.assert_allclose(decoded.log_probs, np.log(np.maximum(highest, 1e-30)), atol=0.05)
  assert top.manifest.size * 20 < dense.manifest.size
