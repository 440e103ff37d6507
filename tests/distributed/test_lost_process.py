"""Errors of jax, Gloo and Orbax that tell of a lost process are told apart from all others.

The texts were recorded from two processes on CPUs, of which one was killed.
"""

import errno
import socket
import subprocess
import sys

import jax
import pytest

from distill_jax.distributed import hosts
from distill_jax.distributed.lost_process import LOST_PROCESS_CODE, is_lost_process
from distill_jax.jobs import cli

JaxError = jax.errors.JaxRuntimeError
GLOO = "[external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:55949"
BARRIER = (
  "DEADLINE_EXCEEDED: Barrier timed out. Id: [12]::sync, RPC: "
  "/xla.coordination.CoordinationService/Barrier"
)


@pytest.mark.parametrize(
  "error",
  [
    JaxError(f"UNKNOWN: Gloo all-reduce failed: {GLOO}"),
    ValueError(f"UNKNOWN: Gloo AllGather failed: {GLOO}"),
    JaxError(BARRIER),
    JaxError("INTERNAL: Core halted unexpectedly"),
    JaxError("INTERNAL: The tasks have crashed: heartbeat timeout"),
    TimeoutError("Timed out while waiting for other processes"),
    RuntimeError(f"process 1: {BARRIER}"),
    ValueError("UNAVAILABLE: Connection reset by peer"),
  ],
)
def test_errors_after_a_loss(error):
  assert is_lost_process(error)


@pytest.mark.parametrize(
  "error",
  [
    ValueError("batch_size: expected 8, got 7"),
    JaxError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"),
    JaxError("INVALID_ARGUMENT: Argument does not match"),
    OSError(errno.ENOSPC, "No space left on device"),
    TimeoutError(errno.ETIMEDOUT, "Connection timed out", "/mnt/run"),
    KeyError("logits"),
  ],
)
def test_errors_of_one_process(error):
  assert not is_lost_process(error)


def test_loss_is_recognized_by_its_cause():
  try:
    try:
      raise JaxError(BARRIER)
    except JaxError as cause:
      raise RuntimeError("checkpoint 3 was not written") from cause
  except RuntimeError as error:
    assert is_lost_process(error)


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (ValueError(f"UNKNOWN: Gloo AllGather failed: {GLOO}"), LOST_PROCESS_CODE),
    (ValueError("steps: expected an integer >= 1"), 2),
    (RuntimeError("checkpoint 3 of run was not written: No space left on device"), 2),
  ],
)
def test_command_exits_with_the_code_of_its_error(monkeypatch, capsys, error, code):
  def fail(argv):
    raise error

  monkeypatch.setattr(cli, "main", fail)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(hosts.os, "_exit", sys.exit)
  with pytest.raises(SystemExit) as ended:
    cli.run([])
  assert ended.value.code == code
  assert capsys.readouterr().err.count("\n") == 1


ABORT = """
import os
from distill_jax.distributed.lost_process import exit_at_abort
exit_at_abort()
os.abort()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGABRT of this kind")
def test_process_that_jax_aborts_exits_with_the_code():
  ended = subprocess.run([sys.executable, "-c", ABORT], capture_output=True, check=False)
  assert ended.returncode == LOST_PROCESS_CODE


def test_taken_port_is_named():
  with socket.create_server(("", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ValueError, match=rf"^coordinator_address: .*{address}"):
      hosts.join(address, 2, 0)


@pytest.mark.parametrize(
  "address", ["localhost", "localhost:", "localhost:port", "localhost:70000"]
)
def test_address_without_a_port_is_named(address):
  with pytest.raises(ValueError, match="^coordinator_address: "):
    hosts.join(address, 2, 1)
