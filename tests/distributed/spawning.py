"""Several processes on this machine that work together as several hosts do, with 8 virtual CPU devices among them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from distill_jax.distributed import hosts

ROOT = Path(__file__).parents[2]
_PLACE = "DISTILL_JAX_TEST_HOST"


def spawn(count, script, *arguments, devices=8):
  """Starts `python script arguments` as each of `count` processes; their output is to be read by `finish`."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = [
    f"--xla_force_host_platform_device_count={devices // count}",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
  environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
  # A script's own folder is where Python looks first: these tests are of the tree that they lie in.
  environment["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  )
  return [
    subprocess.Popen(
      [sys.executable, str(script), *map(str, arguments)],
      env={**environment, _PLACE: f"127.0.0.1:{port} {count} {process}"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(count)
  ]


def place():
  """In the script: the first process' address, how many there are, and which one this is."""
  address, count, process = os.environ[_PLACE].split()
  return address, int(count), int(process)


def join():
  """In the script: makes this process one of those that were spawned."""
  address, count, process = place()
  if count > 1:
    hosts.join(address, count, process)


def finish(processes, *, expected=0, seconds=120):
  """Their outputs when all have ended; those that have not after some time are killed, and all outputs are shown."""
  deadline = time.monotonic() + seconds
  outputs = []
  try:
    for process in processes:
      outputs.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[0])
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        outputs.append(process.communicate()[0])
  codes = [process.returncode for process in processes]
  assert codes == [expected] * len(processes), "\n".join([f"ended with {codes}", *outputs])
  return outputs


def said(start, outputs):
  """Of each process what follows `start` in its line; what Gloo tells may stand in front of it."""
  return [output.partition(start)[2].splitlines()[0] for output in outputs]
