"""A small state, spread over all devices of all processes; and what each process does in test_checkpointing.py."""

import functools
import json
import os
import signal
import sys
import time
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from spawning import join

from distill_jax.distributed import hosts
from distill_jax.distributed.interruption import Interrupted, Interruption
from distill_jax.storage import checkpoint
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.saver import Saver
from distill_jax.types import Skips, TrainState, Variables


def make_state(step, devices):
  """The same values on any mesh; some leaves are spread over it, others are on every device."""
  mesh = jax.make_mesh(
    (len(devices),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
  )
  spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))

  def make(sharding, function):
    return jax.jit(function, out_shardings=sharding)()

  def normal(number, shape, sharding, dtype=jnp.float32):
    key = jax.random.fold_in(jax.random.key(step), number)
    return make(sharding, lambda: jax.random.normal(key, shape).astype(dtype))

  params = {
    "kernel": normal(0, (64, 24), spread),
    "wide": normal(1, (16, 128), NamedSharding(mesh, PartitionSpec(None, "fsdp")), jnp.bfloat16),
    "bias": normal(2, (24,), everywhere),
  }
  count, *skips = (make(everywhere, lambda n=n: jnp.int32(n)) for n in (step, 0, 0, 0))
  return TrainState(
    step=count,
    key=make(everywhere, lambda: jax.random.key(7)),
    params={"student": params, "objective": {}},
    model_state={"student": {}, "objective": ()},
    opt_state=jax.tree.map(lambda x: jnp.square(x), params),
    average=(),
    skips=Skips(*skips),
  )


def save(folder, other):
  zeros = make_state(0, jax.devices())
  with Checkpoints(folder, best=("accuracy", "max")) as checkpoints:
    assert checkpoints.restore(zeros) is None
    for step, accuracy in ((1, 0.9), (2, 0.2), (3, 0.3), (4, 0.4)):
      checkpoints.save(make_state(step, jax.devices()), metrics={"accuracy": accuracy})
    told = {"steps": checkpoints.steps(), "best": checkpoints.best_step}
    # A run that was resumed from 3 comes to other bits at 4: they replace what is there.
    changed = make_state(5, jax.devices())._replace(step=make_state(4, jax.devices()).step)
    checkpoints.save(changed, metrics={"accuracy": 0.5})
    told["replaced"] = fingerprint(checkpoints.restore(zeros)) == fingerprint(changed)
    checkpoints.save(make_state(6, jax.devices()), metrics={"accuracy": 0.6})
  told["newest"] = restored(folder)
  if jax.process_index() == 1:  # it alone cannot read its part of the newest one
    checkpoint.ocp.load_checkpointables = functools.partial(
      fail_at, "6", checkpoint.ocp.load_checkpointables
    )
  told["damaged on one"] = restored(folder)
  try:
    Checkpoints(folder if jax.process_index() == 0 else other)
  except OSError as error:
    told["not shared"] = str(error)
  return told | best_in_memory()


def fail_at(step, load, path, wanted):
  if path.name == step:
    raise OSError("a bad sector")
  return load(path, wanted)


def restored(folder):
  """The newest sound checkpoint, with what was said about the damaged ones, and about a state that does not fit."""
  zeros = make_state(0, jax.devices())
  reader = Checkpoints(folder, read_only=True)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    state = reader.restore(zeros)
  try:
    reader.restore(zeros._replace(average=zeros.step))
  except ValueError as error:
    refused = str(error)
  return {
    "step": int(state.step),
    "fingerprint": fingerprint(state),
    "spread": state.params["student"]["kernel"].sharding.spec == PartitionSpec("fsdp"),
    "warnings": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
    "refused": refused,
  }


def best_in_memory():
  """The best variables survive that the state they came from is donated."""
  donate = jax.jit(
    lambda state: jax.tree.map(lambda x: x + x if x.dtype == jnp.float32 else x, state),
    donate_argnums=0,
  )
  with Saver(None, ("accuracy", "max"), {}) as saver:
    for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.5)):
      state = make_state(step, jax.devices())
      saver.save(state, {"accuracy": accuracy})
      donate(state.params)
    best = saver.best_variables(make_state(4, jax.devices()))
  expected = make_state(2, jax.devices())
  return {
    "best in memory": fingerprint(best) == fingerprint(Variables(expected.params["student"], {}))
  }


def interrupted(folder):
  """After which question both stop, where SIGTERM comes between a save and the next question of a resumed run."""
  stopped = None
  try:
    with Interruption() as interruption, Checkpoints(folder) as checkpoints:
      assert not interruption.at()
      checkpoints.save(make_state(1000, jax.devices()))
      if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(3)  # jax looks for it once a second, and the processes agree on a number at once
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
  hosts.SEEN = 0.1
  told = {"save": save, "restore": restored, "interrupted": interrupted}[sys.argv[1]](*sys.argv[2:])
  hosts.run_on_all(lambda: None)
  print("told", json.dumps(told))
