from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.checkpoint import Checkpoints
from distill_jax.fingerprint import named_leaves
from distill_jax.types import Skips, TrainState, Variables


def make_state(step=0, seed=0, width=3):
  def normal(i, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape).astype(dtype)

  student = {
    "dense": {"kernel": normal(0, (4, width)), "bias": normal(1, (width,), jnp.bfloat16), "none": {}},
    "layers": [normal(i, (2,), jnp.float16) for i in range(12)],
    "mask": normal(2, (5,)) > 0,
  }
  params = {"student": student, "objective": {"projection": normal(3, (width, 2))}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  trained = {"student": {"dense": {"kernel": student["dense"]["kernel"]}}, "objective": params["objective"]}
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.array(step, jnp.int32),
    key=jax.random.key(seed + 1),
    params=params,
    model_state={"student": {"dropout": jax.random.split(jax.random.key(7), 2)}, "objective": ()},
    opt_state=optimizer.init(trained),
    average=Variables(student, ()),
    skips=Skips(zero, zero + 1, zero + 2),
  )


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b)):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def saved(folder, *steps, **options):
  """A folder with checkpoints of these steps, each with its own values."""
  with Checkpoints(folder, keep=len(steps), **options) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(step, seed=step))
  return folder


def flip(file, byte, bit):
  content = bytearray(file.read_bytes())
  content[byte] ^= 1 << bit
  file.write_bytes(content)


def largest_file(folder):
  return max((f for f in Path(folder).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_every_leaf_comes_back_bit_for_bit(tmp_path):
  state = make_state(7)
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.restore(state) is None
    checkpoints.save(state)
    same(checkpoints.restore(make_state(0, seed=5)), state)
  abstract = jax.eval_shape(lambda: make_state(0))
  same(Checkpoints(tmp_path / "run", read_only=True).restore(abstract), state)


def test_the_latest_and_the_best_stay_also_across_restarts(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.9, 5: float("inf"), 6: 0.7, 7: 0.1}
  for step, score in scores.items():
    with Checkpoints(tmp_path, best=("accuracy", "max")) as checkpoints:
      checkpoints.restore(make_state())
      checkpoints.save(make_state(step, seed=step), metrics={"accuracy": score, "loss": -score})
  with Checkpoints(tmp_path, best=("accuracy", "max")) as checkpoints:
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best_step == 2
    assert checkpoints.best_metrics == {"accuracy": 0.9, "loss": -0.9}
    same(checkpoints.restore(make_state(), step="best"), make_state(2, seed=2))
    same(checkpoints.restore(make_state()), make_state(7, seed=7))
    same(checkpoints.restore(make_state(), step=6), make_state(6, seed=6))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "6", "7"]
  assert Checkpoints(tmp_path, best=("loss", "min"), read_only=True).best_step == 2
  with pytest.raises(ValueError, match="finite value of best=.*typo"):
    Checkpoints(tmp_path, best=("typo", "min"), read_only=True).restore(make_state(), step="best")
