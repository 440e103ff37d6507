"""Train states with leaves of every kind, and checkpoints, for tests and child processes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.trees import named_leaves
from distill_jax.types import Skips, TrainState, Variables


@jax.jit
def make_state(step=0, seed=0):
  """Returns a state of many dtypes, with more than ten leaves in a list."""
  key = jax.random.key(seed)

  def normal(index, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(key, index), shape).astype(dtype)

  dense = {"kernel": normal(0, (4, 8)), "bias": normal(1, (8,), jnp.bfloat16), "none": {}}
  student = {
    "dense": dense,
    "layers": list(normal(5, (11, 2), jnp.float16)),
    "mask": normal(2, (5,)) > 0,
    "table": normal(4, (64, 16)),
  }
  params = {"student": student, "objective": {"projection": normal(3, (8, 2))}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  trainable = {"student": {"dense": {"kernel": dense["kernel"]}}, "objective": params["objective"]}
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    key=jax.random.fold_in(key, 1),
    params=params,
    model_state={"student": {"dropout": jax.random.split(jax.random.key(7), 2)}, "objective": ()},
    opt_state=optimizer.init(trainable),
    average=Variables({"dense": dense}, ()),
    skips=Skips(zero, zero + 1, zero + 2),
  )


def assert_identical(a, b):
  """Checks structure, names, dtypes, shapes and every bit of two trees."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b)):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def save_steps(folder, *steps, **options):
  """Writes checkpoints of these steps, each with its own values, and returns the folder."""
  with Checkpoints(folder, keep=len(steps), **options) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(step, seed=step))
  return folder


def flip(file, byte, bit):
  """Flips one bit of a file in place."""
  content = bytearray(file.read_bytes())
  content[byte] ^= 1 << bit
  file.write_bytes(content)


def detects_flip(reader, newest, states, file, position):
  """Flips one bit of the newest checkpoint, restores, and flips it back.

  Checks that all restored bits are correct, and that a warning names the folder exactly where the
  older checkpoint was restored.

  Returns:
    Whether the flip was detected.
  """
  flip(file, *position)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    state = reader.restore(states[1])
  step = int(state.step)
  assert_identical(state, states[step])
  warned = any(str(newest) in str(warning.message) for warning in caught)
  assert warned == (step == 1), (file, position)
  flip(file, *position)
  return warned
