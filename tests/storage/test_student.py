"""Exported weights come back bit for bit, and corrupt or mismatched files raise."""

import json
import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import distill_jax
from distill_jax.storage.inputs import describe_inputs
from distill_jax.storage.student import export_student, load_student
from distill_jax.types import Model, Variables


def init(key, batch):
  width = batch["image"].shape[-1]
  layers = {
    i: {"kernel": jax.random.normal(jax.random.fold_in(key, i), (width, width))} for i in range(12)
  }
  state = {"mean": jnp.arange(4, dtype=jnp.bfloat16), "count": jnp.int32(3)}
  halves = [jnp.full(2, i, jnp.float16) for i in range(12)]
  return Variables({"layers": layers, "list": halves}, state)


INIT = jax.jit(init)
MODEL = Model(init, lambda *_, **__: None)
BATCH = {"image": np.zeros((2, 5), np.float32)}


@pytest.fixture
def student():
  return INIT(jax.random.key(3), BATCH)


def assert_identical(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_student_comes_back_in_the_structure_of_the_model(tmp_path, student):
  folder = export_student(student, tmp_path / "export", description={"accuracy": 0.97})
  assert_identical(load_student(folder, MODEL, BATCH), student)
  assert_identical(
    load_student(folder / "model.safetensors", MODEL._replace(variables=student)), student
  )


def test_description_holds_leaves_and_versions(tmp_path, student):
  folder = export_student(student, tmp_path, description={"accuracy": 0.97})
  text = json.loads((folder / "model.json").read_text())
  assert text["description"] == {"accuracy": 0.97}
  assert text["leaves"]["params/layers/10/kernel"] == [[5, 5], "float32"]
  assert set(text["versions"]) == {"distill_jax", "jax", "safetensors", "python"}
  assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_safetensors_reads_the_weights(tmp_path, student):
  folder = export_student(student, tmp_path, description={})
  with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
    assert len(file.keys()) == len(jax.tree.leaves(student))
    for i in range(12):
      np.testing.assert_array_equal(
        file.get_tensor(f"params/layers/{i}/kernel"), student.params["layers"][i]["kernel"]
      )
      np.testing.assert_array_equal(file.get_tensor(f"params/list/{i}"), np.float16(i))


def test_every_mismatched_leaf_has_a_line(tmp_path, student):
  folder = export_student(student, tmp_path, description={})
  other = jax.tree.map(lambda x: x, student)
  other.params["layers"][3] = {"kernel": jnp.zeros((5, 6)), "bias": jnp.zeros(5)}
  other.state["mean"] = jnp.zeros(4)
  del other.state["count"]
  with pytest.raises(ValueError) as error:
    load_student(folder, MODEL._replace(variables=other))
  lines = str(error.value).splitlines()
  assert str(folder / "model.safetensors") in lines[0]
  assert lines[1:] == [
    "  missing: params/layers/3/bias float32[5]",
    "  unexpected: state/count int32[]",
    "  differs: params/layers/3/kernel is float32[5,5], expected float32[5,6]",
    "  differs: state/mean is bfloat16[4], expected float32[4]",
  ]


def test_flipped_bits_in_the_weights_raise(tmp_path, student, rng):
  folder = export_student(student, tmp_path, description={})
  model, file = MODEL._replace(variables=student), folder / "model.safetensors"
  content = file.read_bytes()
  header = 8 + int.from_bytes(content[:8], "little")
  unnoticed = 0
  for byte in [*rng.integers(header, len(content), 24), *rng.integers(0, header, 24)]:
    flipped = bytearray(content)
    flipped[byte] ^= 1 << rng.integers(8)
    file.write_bytes(flipped)
    try:
      assert_identical(load_student(folder, model), student)
      # Harmless: padding of the header.
      unnoticed += 1
    except ValueError as error:
      assert str(file) in str(error)
  assert unnoticed < 4


def test_files_of_two_exports_raise(tmp_path, student):
  other = INIT(jax.random.key(4), BATCH)
  first = export_student(student, tmp_path / "a", description={})
  second = export_student(other, tmp_path / "b", description={})
  (first / "model.json").write_bytes((second / "model.json").read_bytes())
  with pytest.raises(ValueError, match=r"fingerprint"):
    load_student(first, MODEL, BATCH)
  export_student(other, first, description={})
  assert_identical(load_student(first, MODEL, BATCH), other)


class Bomb:
  """Fails the test when it is unpickled."""

  def __reduce__(self):
    return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("name", ["weights.pkl", "model.pt", "checkpoint"])
def test_pickle_raises_unopened(tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match=rf"path: .*{tmp_path / name}"):
    load_student(tmp_path / name, MODEL, BATCH)


def test_pickle_under_another_name_raises(tmp_path, student):
  folder = export_student(student, tmp_path, description={})
  (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match=r"model\.safetensors"):
    load_student(folder, MODEL, BATCH)


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_missing_file_is_named(tmp_path, student, missing):
  (export_student(student, tmp_path, description={}) / missing).unlink()
  with pytest.raises(FileNotFoundError, match=missing):
    load_student(tmp_path, MODEL, BATCH)


def test_corrupt_description_raises(tmp_path, student):
  folder = export_student(student, tmp_path, description={})
  for text in ("", "{", "[]", "{}"):
    (folder / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.json"):
      load_student(folder, MODEL, BATCH)


def test_model_without_variables_needs_a_batch(tmp_path, student):
  with pytest.raises(ValueError, match=r"batch"):
    load_student(export_student(student, tmp_path, description={}), MODEL)


def test_leaves_that_safetensors_cannot_hold_raise(tmp_path, student):
  state = {"rng": {"key": jax.random.key(0)}}
  with pytest.raises(ValueError, match=r"variables: .*state/rng/key"):
    export_student(student._replace(state=state), tmp_path, description={})
  state = {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}
  with pytest.raises(ValueError, match=r"state/a/b"):
    export_student(student._replace(state=state), tmp_path, description={})
  assert not (tmp_path / "model.json").exists()


def test_failed_export_keeps_the_last_one(tmp_path, student, monkeypatch):
  folder = export_student(student, tmp_path, description={})
  monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
  with pytest.raises(OSError, match="disk full"):
    export_student(INIT(jax.random.key(4), BATCH), folder, description={})
  assert_identical(load_student(folder, MODEL, BATCH), student)


def test_package_has_what_saves_and_loads_students():
  assert distill_jax.export_student is export_student
  assert distill_jax.load_student is load_student
  assert distill_jax.describe_inputs is describe_inputs


WRONG_VARIABLES = {
  "result": lambda v: SimpleNamespace(variables=v, state=None),
  "state": lambda v: SimpleNamespace(params={"student": v.params}),
  "params": lambda v: v.params,
  "pair": tuple,
}


@pytest.mark.parametrize("kind", WRONG_VARIABLES)
def test_export_takes_variables_only(tmp_path, student, kind):
  with pytest.raises(ValueError, match=r"^variables: .*result\.variables"):
    export_student(WRONG_VARIABLES[kind](student), tmp_path, description={})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("description", [None, "a student", {"accuracy": np.float32(0.9)}])
def test_export_names_a_description_json_cannot_hold(tmp_path, student, description):
  with pytest.raises(ValueError, match="^description: "):
    export_student(student, tmp_path, description=description)


def test_load_names_a_network_that_is_no_model(tmp_path, student):
  folder = export_student(student, tmp_path, description={})
  for network in (Bomb, object()):
    with pytest.raises(ValueError, match=r"^model: .*from_nnx"):
      load_student(folder, network, BATCH)
  with pytest.raises(ValueError, match="^batch: .*ndarray"):
    load_student(folder, MODEL, BATCH["image"])


def test_allow_shrunk_accepts_other_sizes_but_not_ranks(tmp_path, student):
  large = MODEL._replace(variables=student)
  small = jax.tree.map(lambda x: x, student)
  small.params["layers"][3] = {"kernel": jnp.ones((5, 2))}
  folder = export_student(small, tmp_path, description={})
  assert_identical(load_student(folder, large, allow_shrunk=True), small)
  with pytest.raises(ValueError, match=r"differs: params/layers/3/kernel"):
    load_student(folder, large)
  small.params["layers"][3] = {"kernel": jnp.ones(5)}
  export_student(small, folder, description={})
  with pytest.raises(ValueError, match=r"differs: params/layers/3/kernel"):
    load_student(folder, large, allow_shrunk=True)
