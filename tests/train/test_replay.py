"""RandomSampling that are used again, against a buffer kept by hand; small rows whose tokens
say when they were sampled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, losses, objectives
from distill_jax.distributed import sharding
from distill_jax.models import from_apply
from distill_jax.train import (
  CheckpointOptions,
  RunOptions,
  StepOptions,
  fit,
  make_init,
  make_train_step,
  with_replay,
)
from distill_jax.types import Variables

ROWS, EVERY, KEPT = 8, 3, 10


def batch(step):
  """Rows of their own in every step."""
  ids = np.arange(ROWS) + ROWS * step
  return {"id": ids, "tokens": np.repeat(ids[:, None], 4, 1).astype(np.int32), "where": ids % 7 > 0}


def stamped(student, key, batch):
  """Every other row, 'generated' by adding the student's number."""
  del key
  sampled = jnp.arange(len(batch["id"])) % 2 == 0
  tokens = jnp.where(sampled[:, None], batch["tokens"] + student.params["number"], batch["tokens"])
  return {**batch, "tokens": tokens, "generated": sampled}


REPLAY = with_replay(stamped, every=EVERY, buffer_size=KEPT)
APPLY = jax.jit(REPLAY.apply)


def run(steps, key=0):
  buffer, taken = REPLAY.init(batch(0)), []
  for step in range(steps):
    student = Variables({"number": jnp.int32(1000 * (step + 1))}, {})
    new, buffer = APPLY(
      student, buffer, step, jax.random.fold_in(jax.random.key(key), step), batch(step)
    )
    taken.append(jax.device_get(new))
  return taken


def test_rows_are_new_every_third_step_and_replayed_between():
  kept, seen = [], set()
  for step, new in enumerate(run(30)):
    old, sampled = batch(step), new["generated"]
    if step % EVERY == 0:
      np.testing.assert_array_equal(new["tokens"][::2], old["tokens"][::2] + 1000 * (step + 1))
      valid = sampled & old["where"]
      kept = (kept + [tuple(row) for row in new["tokens"][valid]])[-KEPT:]
      number = valid.sum()
    else:
      assert sampled.sum() == number
      assert {tuple(row) for row in new["tokens"][sampled]} <= set(kept)
      np.testing.assert_array_equal(new["tokens"][sampled, 0] % 1000, new["id"][sampled])
      assert new["where"][sampled].all()
      seen |= {*np.flatnonzero(sampled)}
      np.testing.assert_array_equal(new["tokens"][~sampled], old["tokens"][~sampled])
  assert seen == {*range(ROWS)}


def test_replayed_rows_are_uniform_and_follow_key_and_id():
  rows = [new["tokens"][new["generated"], 0] for key in range(200) for new in run(2, key)[1:]]
  values, counts = np.unique(np.concatenate(rows), return_counts=True)
  np.testing.assert_array_equal(values, 1000 + np.array([2, 4, 6]))  # row 0 is not valid
  total = counts.sum()
  np.testing.assert_allclose(counts / total, 1 / 3, atol=4 * np.sqrt(2 / 9 / total))


def network():
  def apply(w, tokens):
    return {"logits": jax.nn.one_hot(tokens[:, 0] % 5, 5) @ w["w"]}

  return from_apply(
    lambda key, tokens: {"w": jax.random.normal(key, (5, 5))}, apply, inputs="tokens"
  )


def counted(student, key, batch):
  """Rows that are drawn with the student's weights."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["id"])
  drawn = jax.vmap(jax.random.categorical, (0, None))(keys, student.params["w"][0])
  sampled = batch["id"] % 2 == 0
  tokens = jnp.where(sampled[:, None], drawn[:, None].astype(jnp.int32), batch["tokens"])
  return {**batch, "tokens": tokens, "generated": sampled}


def train(folder=None, steps=6, devices=8):
  rng = np.random.default_rng(0)
  arrays = {
    "id": np.arange(64),
    "tokens": rng.integers(0, 5, (64, 2)),
    "label": np.zeros(64, np.int32),
  }
  return fit(
    network(),
    network(),
    objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence))),
    optax.sgd(0.5),
    data.Source(arrays, 5, name="rows"),
    steps=steps,
    batch_size=16,
    teacher_variables=network().init(jax.random.key(9), {"tokens": arrays["tokens"]}),
    step=StepOptions(on_policy=with_replay(counted, every=3, buffer_size=32)),
    run=RunOptions(mesh=sharding.make_mesh(devices=jax.devices()[:devices]), progress=False),
    checkpoints=None if folder is None else CheckpointOptions(folder, every=4),
  )


def test_run_resumes_with_its_buffer_on_any_devices(tmp_path):
  whole = train()
  train(tmp_path, steps=4)
  resumed = train(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
  jax.tree.map(np.testing.assert_array_equal, resumed.state.model_state, whole.state.model_state)
  one = train(devices=1)
  for a, b in zip(*(jax.tree.leaves((f.state.params, f.state.model_state)) for f in (one, whole))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_skipped_update_does_not_leave_nothing_to_replay():
  student = Variables({"number": jnp.int32(1000)}, {})
  new, buffer = APPLY(student, REPLAY.init(batch(1)), 1, jax.random.key(0), batch(1))
  np.testing.assert_array_equal(new["tokens"][::2], batch(1)["tokens"][::2] + 1000)
  assert buffer["filled"] == (new["generated"] & new["where"]).sum()


def test_arguments_that_do_not_fit_are_rejected():
  with pytest.raises(ValueError, match="every"):
    with_replay(stamped, every=1, buffer_size=8)
  with pytest.raises(ValueError, match="buffer_size"):
    with_replay(stamped, every=2, buffer_size=7).init(batch(0))
  replay, net = with_replay(counted, every=2, buffer_size=8), network()
  parts = net, net, objectives.weighted(hard=(1.0, objectives.labels())), optax.sgd(0.1)
  with pytest.raises(ValueError, match="on_policy"):
    make_train_step(*parts, StepOptions(on_policy=replay, axis_name="data"))
  rows = {**batch(0), "label": np.zeros(ROWS, np.int32)}
  state = make_init(*parts)(jax.random.key(0), rows)
  with pytest.raises(ValueError, match="on_policy"):
    make_train_step(*parts, StepOptions(on_policy=replay))(
      state, net.init(jax.random.key(0), rows), rows
    )
