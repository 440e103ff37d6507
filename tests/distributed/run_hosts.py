"""Runs in each process of test_hosts.py: coordination, a lease, SIGTERM, and an error."""

import functools
import json
import os
import sys

import jax
import numpy as np
from spawning import join

from distill_jax.distributed import equality, hosts
from distill_jax.distributed.interruption import Interrupted, Interruption
from distill_jax.storage.lease import Lease
from distill_jax.types import Skips, TrainState


def coordinate(folder):
  """Prints what this process got from the others, then takes steps until SIGTERM."""
  results = {
    "process": jax.process_index(),
    "first": hosts.run_on_first(lambda: [os.getpid(), 0.1, None]),
    "in turn": hosts.run_in_turn(lambda: append(f"{folder}.turns")),
  }
  for process in range(jax.process_count()):
    for run in (hosts.run_on_all, hosts.run_on_first):
      results[f"{run.__name__} {process}"] = error_of(
        lambda run=run, process=process: run(functools.partial(fail_on, process))
      )
  long = functools.partial(fail_on, 0, "ö" * 5000)
  results["long"] = error_of(lambda: hosts.run_on_all(long))
  results["equal"] = error_of(lambda: equality.assert_equal("seed", 3))
  value = {"long": "a" * 200 + str(jax.process_index())}
  results["different"] = error_of(lambda: equality.assert_equal("run", value))
  results |= lease(folder)
  hosts.run_on_all(lambda: None)
  results["files"] = os.listdir(folder)
  print("results", json.dumps(results), flush=True)
  step_until_sigterm()


def append(path):
  """Appends this process' index to a file, and returns the file's content."""
  with open(path, "a+") as file:
    file.write(str(jax.process_index()))
    file.seek(0)
    return file.read()


def fail_on(process, text="there is nö"):
  if jax.process_index() == process:
    raise FileNotFoundError(f"{text} {process}")


def error_of(action):
  try:
    action()
  except (OSError, ValueError) as error:
    return [type(error).__name__, str(error)]
  return None


def lease(folder):
  with Lease(folder) as outer:
    outer.check()
    owner = json.loads((outer.folder / ".lease").read_text())["pid"]
    second = error_of(lambda: Lease(folder).__enter__())
    # No process leaves before the other one has looked.
    hosts.run_on_all(lambda: None)
  return {"lease": owner, "second lease": second}


def step_until_sigterm():
  print("stepping", flush=True)
  with Interruption() as interruption:
    for step in range(1, 10**6):
      # It keeps the processes near one another, as a step's collectives do.
      hosts.run_on_all(lambda: None)
      if interruption.at():
        print("stopped after", step, flush=True)
        zero = np.int32(0)
        raise Interrupted(TrainState(np.int32(step), zero, {}, {}, (), (), Skips(zero, zero, zero)))


def fail(folder, process):
  """Lets one process fail while the others take a step and a checkpoint is being written."""
  from sharded_state import make_state

  from distill_jax.storage.checkpoint import Checkpoints

  with Checkpoints(folder) as checkpoints:
    checkpoints.save(make_state(1, jax.devices()))
    for step in range(1000):
      if step == 3 and jax.process_index() == int(process):
        raise KeyError("only here")
      hosts.run_on_all(lambda: None)


if __name__ == "__main__":
  join()
  {"coordinate": coordinate, "fail": fail}[sys.argv[1]](*sys.argv[2:])
