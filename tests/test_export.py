import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.export import export_student, load_student
from distill_jax.types import Model, Variables


def init(key, batch):
  width = batch["image"].shape[-1]
  layers = {i: {"kernel": jax.random.normal(jax.random.fold_in(key, i), (width, width))} for i in range(12)}
  state = {"mean": jnp.arange(4, dtype=jnp.bfloat16), "count": jnp.int32(3)}
  return Variables({"layers": layers, "list": [jnp.full(2, i, jnp.float16) for i in range(12)]}, state)


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
  folder = export_student(tmp_path / "export", student, description={"config": "digits", "accuracy": 0.97})
  same(load_student(folder, MODEL, BATCH), student)
  same(load_student(folder / "model.safetensors", MODEL._replace(variables=student)), student)
