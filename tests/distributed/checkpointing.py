"""Runs in each process of test_checkpointing.py: saves, replaces and restores checkpoints."""

import functools
import json
import os
import signal
import sys
import time
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from sharded_state import make_state
from spawning import join

from distill_jax.distributed import hosts
from distill_jax.distributed.interruption import Interrupted, Interruption
from distill_jax.storage import serialization
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.saver import Saver
from distill_jax.types import Variables


def save(folder, other):
  zeros = make_state(0, jax.devices())
  with Checkpoints(folder, best=("accuracy", "max")) as checkpoints:
    assert checkpoints.restore(zeros) is None
    for step, accuracy in ((1, 0.9), (2, 0.2), (3, 0.3), (4, 0.4)):
      checkpoints.save(make_state(step, jax.devices()), metrics={"accuracy": accuracy})
    results = {"steps": checkpoints.steps(), "best": checkpoints.best_step}
    # A run that resumed from 3 reaches other bits at 4: they replace what is stored.
    changed = make_state(5, jax.devices())._replace(step=make_state(4, jax.devices()).step)
    checkpoints.save(changed, metrics={"accuracy": 0.5})
    results["replaced"] = fingerprint(checkpoints.restore(zeros)) == fingerprint(changed)
    checkpoints.save(make_state(6, jax.devices()), metrics={"accuracy": 0.6})
  results["newest"] = restored(folder)
  if jax.process_index() == 1:
    # Only this process cannot read its part of the newest one.
    serialization.ocp.load_checkpointables = functools.partial(
      fail_at, "6", serialization.ocp.load_checkpointables
    )
  results["corrupt on one"] = restored(folder)
  try:
    Checkpoints(folder if jax.process_index() == 0 else other)
  except OSError as error:
    results["not shared"] = str(error)
  return results | best_in_memory()


def fail_at(step, load, path, abstract):
  if path.name == step:
    raise OSError("a bad sector")
  return load(path, abstract)


def restored(folder):
  """Describes the newest valid checkpoint, the warnings before it, and the error of a misfit."""
  zeros = make_state(0, jax.devices())
  reader = Checkpoints(folder, read_only=True)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    state = reader.restore(zeros)
  try:
    reader.restore(zeros._replace(average=zeros.step))
  except ValueError as error:
    misfit = str(error)
  return {
    "step": int(state.step),
    "fingerprint": fingerprint(state),
    "split": state.params["student"]["kernel"].sharding.spec == PartitionSpec("fsdp"),
    "warnings": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
    "misfit": misfit,
  }


def best_in_memory():
  """Returns whether the best variables survive the donation of their state."""
  donate = jax.jit(
    lambda state: jax.tree.map(lambda x: x + x if x.dtype == jnp.float32 else x, state),
    donate_argnums=0,
  )
  with Saver(None, ("accuracy", "max"), {}) as saver:
    for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.5)):
      state = make_state(step, jax.devices())
      saver.save(state, {"accuracy": accuracy})
      donate(state.params)
    best, *_ = saver.best_variables(make_state(4, jax.devices()))
  expected = make_state(2, jax.devices())
  return {
    "best in memory": fingerprint(best) == fingerprint(Variables(expected.params["student"], {}))
  }


def interrupted(folder):
  """Returns the call of `at` that stops both, if SIGTERM comes after a save of a resumed run."""
  stopped = None
  try:
    with Interruption() as interruption, Checkpoints(folder) as checkpoints:
      assert not interruption.at()
      checkpoints.save(make_state(1000, jax.devices()))
      if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      # jax looks for it once a second, and the processes agree on a number at once.
      time.sleep(3)
      for number in range(2, 60):
        if interruption.at():
          stopped = number
          break
        time.sleep(0.1)
  except Interrupted:
    pass
  return {"stopped": stopped, "saved": Checkpoints(folder, read_only=True).steps()}


if __name__ == "__main__":
  join()
  hosts.VISIBLE_SECONDS = 0.1
  results = {"save": save, "restore": restored, "interrupted": interrupted}[sys.argv[1]](
    *sys.argv[2:]
  )
  hosts.run_on_all(lambda: None)
  print("results", json.dumps(results))
