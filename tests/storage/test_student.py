import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import distill_jax
from distill_jax.storage.student import export_student, load_student
from distill_jax.types import Model, Variables


def init(key, batch):
  width = batch["image"].shape[-1]
  layers = {
    i: {"kernel": jax.random.normal(jax.random.fold_in(key, i), (width, width))} for i in range(12)
  }
  state = {"mean": jnp.arange(4, dtype=jnp.bfloat16), "count": jnp.int32(3)}
  return Variables(
    {"layers": layers, "list": [jnp.full(2, i, jnp.float16) for i in range(12)]}, state
  )


MODEL = Model(init, lambda *_, **__: None)
BATCH = {"image": np.zeros((2, 5), np.float32)}


@pytest.fixture
def student():
  return init(jax.random.key(3), BATCH)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_student_comes_back_in_the_models_own_tree(tmp_path, student):
  folder = export_student(
    tmp_path / "export", student, description={"config": "digits", "accuracy": 0.97}
  )
  same(load_student(folder, MODEL, BATCH), student)
  same(load_student(folder / "model.safetensors", MODEL._replace(variables=student)), student)


def test_the_description_says_what_it_is(tmp_path, student):
  folder = export_student(tmp_path, student, description={"accuracy": 0.97})
  text = json.loads((folder / "model.json").read_text())
  assert text["description"] == {"accuracy": 0.97}
  assert text["leaves"]["params/layers/10/kernel"] == [[5, 5], "float32"]
  assert set(text["versions"]) == {"distill_jax", "jax", "safetensors", "python"}
  assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_other_tools_read_the_weights(tmp_path, student):
  folder = export_student(tmp_path, student, description={})
  with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
    assert len(file.keys()) == len(jax.tree.leaves(student))
    for i in range(12):
      np.testing.assert_array_equal(
        file.get_tensor(f"params/layers/{i}/kernel"), student.params["layers"][i]["kernel"]
      )
      np.testing.assert_array_equal(file.get_tensor(f"params/list/{i}"), np.float16(i))


def test_every_difference_from_the_model_is_listed(tmp_path, student):
  folder = export_student(tmp_path, student, description={})
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


def test_a_flipped_bit_in_the_weights_is_an_error(tmp_path, student, rng):
  folder = export_student(tmp_path, student, description={})
  model, file = MODEL._replace(variables=student), folder / "model.safetensors"
  content = file.read_bytes()
  header = 8 + int.from_bytes(content[:8], "little")
  silent = 0
  for byte in [*rng.integers(header, len(content), 60), *rng.integers(0, header, 60)]:
    flipped = bytearray(content)
    flipped[byte] ^= 1 << rng.integers(8)
    file.write_bytes(flipped)
    try:
      same(load_student(folder, model), student)
      silent += 1  # harmless: padding of the header
    except ValueError as error:
      assert str(file) in str(error)
  assert silent < 10


def test_files_of_two_exports_do_not_go_together(tmp_path, student):
  other = init(jax.random.key(4), BATCH)
  first = export_student(tmp_path / "a", student, description={})
  second = export_student(tmp_path / "b", other, description={})
  (first / "model.json").write_bytes((second / "model.json").read_bytes())
  with pytest.raises(ValueError, match="belongs to another export.*Export it again"):
    load_student(first, MODEL, BATCH)
  export_student(first, other, description={})
  same(load_student(first, MODEL, BATCH), other)


class Bomb:
  """Says so when it is unpickled."""

  def __reduce__(self):
    return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("name", ["weights.pkl", "model.pt", "checkpoint"])
def test_a_pickle_is_refused(tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match=f"{tmp_path / name} is .*pickled weights are never opened"):
    load_student(tmp_path / name, MODEL, BATCH)


def test_a_pickle_under_another_name_is_refused(tmp_path, student):
  folder = export_student(tmp_path, student, description={})
  (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match="is damaged or no safetensors file"):
    load_student(folder, MODEL, BATCH)


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, student, missing):
  (export_student(tmp_path, student, description={}) / missing).unlink()
  with pytest.raises(FileNotFoundError, match=f"no {missing} in {tmp_path}"):
    load_student(tmp_path, MODEL, BATCH)


def test_a_damaged_description_is_an_error(tmp_path, student):
  folder = export_student(tmp_path, student, description={})
  for text in ("", "{", "[]", "{}"):
    (folder / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json is damaged"):
      load_student(folder, MODEL, BATCH)


def test_without_variables_or_a_batch_there_is_nothing_to_compare_with(tmp_path, student):
  with pytest.raises(ValueError, match="give batch="):
    load_student(export_student(tmp_path, student, description={}), MODEL)


def test_leaves_that_safetensors_cannot_hold_are_refused(tmp_path, student):
  state = {"rng": {"key": jax.random.key(0)}}
  with pytest.raises(ValueError, match="typed PRNG keys: state/rng/key"):
    export_student(tmp_path, student._replace(state=state), description={})
  state = {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}
  with pytest.raises(ValueError, match="two leaves are named state/a/b"):
    export_student(tmp_path, student._replace(state=state), description={})
  assert not (tmp_path / "model.json").exists()


def test_a_failed_export_leaves_the_last_one(tmp_path, student, monkeypatch):
  folder = export_student(tmp_path, student, description={})
  monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
  with pytest.raises(OSError, match="disk full"):
    export_student(folder, init(jax.random.key(4), BATCH), description={})
  same(load_student(folder, MODEL, BATCH), student)


def test_the_lazy_name_in_the_package():
  assert distill_jax.load_student is load_student
