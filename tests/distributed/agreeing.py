"""What each process does in test_agreeing.py."""

import json
import os
import sys

import jax
import numpy as np
from checkpointing import make_state
from spawning import join

from distill_jax.distributed import hosts
from distill_jax.distributed.interruption import Interrupted, Interruption
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.lease import Lease
from distill_jax.types import Skips, TrainState


def agree(folder):
  told = {
    "process": jax.process_index(),
    "first": hosts.run_on_first(lambda: [os.getpid(), 0.1, None]),
  }
  for process in range(jax.process_count()):

    def fail(process=process):
      if jax.process_index() == process:
        raise FileNotFoundError(f"there is nö {process}")

    for name, ask in {"every": hosts.run_on_all, "first": hosts.run_on_first}.items():
      try:
        ask(fail)
        told[f"{name} {process}"] = None
      except OSError as error:
        told[f"{name} {process}"] = [type(error).__name__, str(error)]
  with Lease(folder) as lease:
    lease.check()
    told["lease"] = json.loads((lease.folder / ".lease").read_text())["pid"]
    try:
      Lease(folder).__enter__()
    except OSError as error:
      told["second"] = str(error)
    hosts.run_on_all(lambda: None)  # no process looks before the other is done
  hosts.run_on_all(lambda: None)
  told["left"] = os.listdir(folder)
  print("told", json.dumps(told))


def interrupted(folder):
  print("stepping", flush=True)
  with Interruption() as interruption:
    for step in range(1, 10**6):
      hosts.run_on_all(
        lambda: None
      )  # as a step's collectives do, it keeps the processes near one another
      if interruption.at():
        print("stopped after", step, flush=True)
        zero = np.int32(0)
        raise Interrupted(TrainState(np.int32(step), zero, {}, {}, (), (), Skips(zero, zero, zero)))


def failing(folder, process):
  """One process fails while the others take a step; the checkpoint that is being written is completed."""
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(make_state(1, jax.devices()))
    for step in range(1000):
      if step == 3 and jax.process_index() == int(process):
        raise KeyError("only here")
      hosts.run_on_all(lambda: None)


if __name__ == "__main__":
  join()
  {"agree": agree, "interrupted": interrupted, "failing": failing}[sys.argv[1]](*sys.argv[2:])
