"""Runs the README's Python as it is written, on data of the reader's shapes."""

import pathlib
import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LOSSES, MODEL, SCORES, METRIC, CACHE, TEXT, MESH = BLOCKS


class Teacher(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(10)(x.reshape(len(x), -1))


class MySmallModule(nnx.Module):
  def __init__(self, rngs):
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(x.reshape(len(x), -1))


def run(block, names, steps):
  exec(re.sub(r"steps=[\d_]+", f"steps={steps}", block), names)
  assert names["result"].history[-1]["step"] == steps


@pytest.fixture
def names(rng, tmp_path, monkeypatch):
  """The names that the README takes as given, in a folder of their own."""
  monkeypatch.chdir(tmp_path)
  images = rng.normal(size=(128, 4, 4, 1)).astype(np.float32)
  labels = rng.integers(0, 10, 128)
  return {
    "my_linen_module": Teacher(),
    "my_trained_variables": Teacher().init(jax.random.key(0), images[:1]),
    "MySmallModule": MySmallModule,
    "images": images,
    "labels": labels,
    "test_images": images[:32],
    "test_labels": labels[:32],
    "new_images": images[:3],
  }


def test_losses_run_in_a_loop_of_your_own(rng):
  def student(params, image):
    return image.mean((1, 2)) @ params, image

  names = {"student": student}
  exec(LOSSES, names)
  batch = {
    "image": jnp.asarray(rng.normal(size=(4, 5, 5, 3)), jnp.float32),
    "label": jnp.array([0, 1, 2, 3]),
    "teacher_logits": jnp.asarray(rng.normal(size=(4, 10)), jnp.float32),
    "teacher_map": jnp.asarray(rng.normal(size=(4, 5, 5, 7)), jnp.float32),
    "where": jnp.array([True, True, True, False]),
  }
  value_and_grad = jax.jit(jax.value_and_grad(names["loss_fn"]))
  value, gradient = value_and_grad(jnp.ones((3, 10)), batch)
  assert value > 0 and np.abs(gradient).max() > 0
  floats = {name: x for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  dirty = batch | {name: x.at[3].set(jnp.nan) for name, x in floats.items()}
  actual = value_and_grad(jnp.ones((3, 10)), dirty)
  np.testing.assert_allclose(actual[0], value, rtol=1e-6)
  np.testing.assert_allclose(actual[1], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:best:UserWarning")  # random labels: no accuracy in ten steps
def test_your_model_runs_live_cached_and_on_a_mesh(names):
  lines = [line for line in MODEL.splitlines() if line.strip()]
  assert len(lines) <= 15, "the core example stays short"
  run(MODEL, names, steps=20)
  exec(SCORES, names)
  assert 0 < names["scores"]["accuracy"] <= 1 and names["logits"].shape == (3, 10)
  exec(METRIC, names)
  scores = names["evaluate"](
    names["student"], names["result"].variables, names["test"], names["task"]
  )
  assert scores["accuracy"] < scores["top3"] <= scores["top5"]
  run(CACHE, names, steps=10)
  assert names["outputs"].num_views == 8
  run(MESH, names, steps=5)
  assert pathlib.Path("run").exists()


def test_language_model_runs(names):
  folder = pathlib.Path("corpus")
  folder.mkdir()
  (folder / "a.txt").write_text("a few words of text. " * 40)
  inputs = ("tokens", "segments", "positions")
  teacher = from_nnx(lambda rngs: Decoder(257, 16, 1, 2, rngs=rngs), inputs=inputs)
  imports = "\n".join(line for line in MODEL.splitlines() if line.startswith(("import", "from")))
  exec(imports, names)
  names["teacher"] = teacher._replace(variables=teacher.init(jax.random.key(1), {}))
  small = TEXT.replace("512, 8, 8", "16, 1, 2").replace("length=1024", "length=16")
  run(small, names, steps=2)


def test_links_point_at_files():
  for link in re.findall(r"\]\(([^)#]+)\)", README):
    assert link.startswith("http") or (ROOT / link).exists(), link
