"""The README's Python runs as it stands, on data of the reader's shapes."""

import pathlib
import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distill_jax import objectives
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.train import fit

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Teacher(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(10)(x.reshape(len(x), -1))


class MySmallModule(nnx.Module):
  def __init__(self, rngs):
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(x.reshape(len(x), -1))


def test_losses_in_your_own_loop(rng):
  def student(params, image):
    return image.mean((1, 2)) @ params, image

  names = {"student": student}
  exec(BLOCKS[0], names)
  batch = {
    "image": jnp.asarray(rng.normal(size=(4, 5, 5, 3)), jnp.float32),
    "label": jnp.array([0, 1, 2, 3]),
    "teacher_logits": jnp.asarray(rng.normal(size=(4, 10)), jnp.float32),
    "teacher_map": jnp.asarray(rng.normal(size=(4, 5, 5, 7)), jnp.float32),
    "where": jnp.array([True, True, True, False]),
  }
  value, gradient = jax.value_and_grad(names["loss_fn"])(jnp.ones((3, 10)), batch)
  assert value > 0 and np.abs(gradient).max() > 0


def test_your_own_model_live_and_from_a_cache(rng, tmp_path, monkeypatch):
  lines = [line for line in BLOCKS[1].splitlines() if line.strip()]
  assert len(lines) <= 15, "under 15 lines with your own model"
  monkeypatch.chdir(tmp_path)
  images = rng.normal(size=(128, 4, 4, 1)).astype(np.float32)
  teacher = Teacher()
  names = {
    "my_linen_module": teacher,
    "my_trained_variables": teacher.init(jax.random.key(0), images[:1]),
    "MySmallModule": MySmallModule,
    "images": images,
    "labels": rng.integers(0, 10, 128),
    "test_images": images[:32],
    "test_labels": rng.integers(0, 10, 32),
  }
  for block, steps in ("\n".join(lines), 20), (BLOCKS[2], 10), (BLOCKS[4], 5):
    exec(block.replace("steps=3000", f"steps={steps}, progress=False"), names)
    assert names["fitted"].history[-1]["step"] == steps
  assert names["outputs"].num_views == 8


def test_language_models(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "corpus").mkdir()
  (tmp_path / "corpus" / "a.txt").write_text("a few words of text. " * 40)
  small = BLOCKS[3].replace("512, 8, 8", "16, 1, 2").replace("length=1024", "length=16")
  names = {"from_nnx": from_nnx, "objectives": objectives, "optax": optax, "fit": fit}
  decoder = from_nnx(
    lambda rngs: Decoder(257, 16, 1, 2, rngs=rngs), inputs=("tokens", "segments", "positions")
  )
  names["teacher"] = decoder._replace(variables=decoder.init(jax.random.key(1), {}))
  exec(small.replace("steps=10_000", "steps=2, progress=False"), names)
  assert names["fitted"].history[-1]["step"] == 2
