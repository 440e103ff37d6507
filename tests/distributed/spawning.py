"""Starts processes that work together as several hosts do, with 8 CPU devices in all."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from distill_jax.distributed import hosts

ROOT = Path(__file__).parents[2]
_VARIABLE = "DISTILL_JAX_TEST_HOST"


def spawn(count, script, *arguments, devices=8):
  """Starts `python script arguments` as each of `count` processes; `finish` reads their output."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = [
    f"--xla_force_host_platform_device_count={devices // count}",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    os.environ.get("DISTILL_JAX_TEST_CODEGEN", ""),
  ]
  environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
  # Python looks first in the folder of a script, and these tests are of the tree that contains
  # them.
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment["PYTHONPATH"] = os.pathsep.join(paths)
  return [
    subprocess.Popen(
      [sys.executable, str(script), *map(str, arguments)],
      env={**environment, _VARIABLE: f"127.0.0.1:{port} {count} {process}"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(count)
  ]


def join_arguments():
  """Returns in the script: the first process' address, the number of processes, this index."""
  address, count, process = os.environ[_VARIABLE].split()
  return address, int(count), int(process)


def join():
  """Makes this process, in the script, one of those that were spawned."""
  address, count, process = join_arguments()
  if count > 1:
    hosts.join(address, count, process)


def finish(processes, *, expected=0, seconds=300):
  """Returns the outputs when all have ended; kills late ones, and shows outputs of failed ones."""
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


def read_until(text, processes, *, seconds=300):
  """Returns the lines of all processes before one with `text`; kills them if it is late."""
  lines = []
  watchdog = threading.Timer(seconds, lambda: [process.kill() for process in processes])
  watchdog.start()
  try:
    for process in processes:
      while text not in (line := process.stdout.readline()):
        assert line or process.poll() is None, "".join(lines)
        lines.append(line)
  finally:
    watchdog.cancel()
  return lines


def lines_after(start, outputs):
  """Returns the rest of each process' line after `start`, before which Gloo may have printed."""
  return [output.partition(start)[2].splitlines()[0] for output in outputs]
