"""Coordinates the processes of one run; a single process communicates nothing."""

import json
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill_jax.distributed.lost_process import LOST_PROCESS_CODE, exit_at_abort, is_lost_process

HEARTBEAT_SECONDS = 10
"""Seconds without a sign of life after which a process counts as dead; jax waits for 100."""
JOIN_SECONDS = 40
"""Seconds that the processes wait at the start for the last one."""
SHUTDOWN_SECONDS = 3600
"""Seconds that the processes wait at the end for the one that writes the report."""
VISIBLE_SECONDS = 10
"""Seconds after which all hosts see a new file: mounts cache for a while that it did not exist."""
_ERROR_BYTES = 2000


def join(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Calls `jax.distributed.initialize`, so that processes notice within 15 s that one has died.

  Call it before anything else uses jax. On TPU pods, under SLURM and Open MPI jax finds the
  arguments itself. From then on an uncaught error ends the process at once (`abort`), and a
  process that loses another one, or waits for it in vain for 40 s here, exits with 75.

  Args:
    coordinator_address: HOST:PORT on which process 0 will listen.
    num_processes: number of processes.
    process_id: index of this process, from 0.

  Raises:
    ValueError: some of the three are None, but not all; one is out of its range; or the port of the
      first process is taken.
  """
  arguments = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in arguments.items() if value is None]
  if missing and len(missing) < len(arguments):
    raise ValueError(f"{', '.join(missing)}: expected all or none of {', '.join(arguments)}")
  if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
    raise ValueError(f"process_id: expected 0 to {num_processes - 1}, got {process_id}")
  if coordinator_address is not None:
    _check_address(coordinator_address, process_id)
  exit_at_abort()
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=JOIN_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
  except jax.errors.JaxRuntimeError as error:
    if "RPC server" not in str(error):
      raise
    raise _taken_port(coordinator_address) from error
  sys.excepthook = _abort_on_error
  # Processes connect in their first collective, and wait 30 s for one another there: now they are
  # all here.
  run_on_all(lambda: None)


def abort(code: int) -> NoReturn:
  """Ends this process at once because of a local error: the other processes notice, and end too.

  Without it jax waits for all processes at the end of one, while the others wait for it in the next
  step.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def is_first() -> bool:
  """Returns whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def run_on_first(action: Callable[[], Any]) -> Any:
  """Runs `action` on the first process and returns its result on all; all must call it.

  Args:
    action: returns a value that json can hold. It must not wait for other processes.

  Raises:
    Exception: what `action` raised, on every process (on the others as the nearest built-in type).
  """
  if jax.process_count() == 1:
    return action()
  result = run_on_all(lambda: action() if is_first() else None)
  text = json.dumps(result).encode()
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  message = np.zeros(length, np.uint8)
  if is_first():
    message[:] = np.frombuffer(text, np.uint8)
  # The broadcast is a sum, which widens the type.
  message = np.asarray(multihost_utils.broadcast_one_to_all(message), np.uint8)
  return json.loads(bytes(message))


def run_on_all(action: Callable[[], Any], *, errors: Sequence[type[Exception]] = ()) -> Any:
  """Runs `action` on every process; if one raises, all raise, so that none waits for it.

  Args:
    action: must not wait for other processes.
    errors: types that it may raise in addition to built-in ones, each built from a text, so that
      the others raise the same type.

  Returns:
    This process' result.

  Raises:
    Exception: what `action` raised here, or else on another process.
  """
  if jax.process_count() == 1:
    return action()
  types = (*errors, OSError, ValueError, MemoryError, RuntimeError, Exception)
  result = None
  error: Exception | None = None
  try:
    result = action()
  except Exception as raised:
    error = raised
  messages = multihost_utils.process_allgather(_encode_error(error, types))
  if error is not None:
    raise error
  for process, message in enumerate(messages):
    if message[0]:
      index, text = json.loads(bytes(message).rstrip(b"\0"))
      raise types[index](f"process {process}: {text}")
  return result


def run_in_turn(action: Callable[[], Any]) -> Any:
  """Runs `action` on the first process, then on the others, which see what it wrote to disk.

  Returns:
    This process' result.
  """
  first_result = run_on_all(lambda: action() if is_first() else None)
  other_result = run_on_all(lambda: None if is_first() else action())
  return first_result if is_first() else other_result


def make_shared_folder(folder: Path) -> None:
  """Creates a folder, and checks that every process can write there and sees the same files.

  Raises:
    OSError: it cannot be created or written, or is not the same folder for all.
  """
  marker = run_on_first(lambda: _create_marker(folder))
  try:
    run_on_all(lambda: _check_writable(folder, marker))
  finally:
    if marker and is_first():
      (folder / marker).unlink(missing_ok=True)


def _check_address(address: str, process_id: int | None) -> None:
  """Checks an address, and on process 0 that its port is free: jax may crash where it is not."""
  port = address.rpartition(":")[2]
  if not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(f"coordinator_address: expected HOST:PORT, got {address!r}")
  if process_id != 0:
    return
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
  except OSError as error:
    raise _taken_port(address) from error


def _taken_port(address: str | None) -> ValueError:
  return ValueError(
    f"coordinator_address: expected a free port on process 0, got {address or 'that of the job'}: "
    "end the process that has it, or give all processes another one"
  )


def _abort_on_error(kind, error, trace) -> None:
  sys.__excepthook__(kind, error, trace)
  abort(LOST_PROCESS_CODE if is_lost_process(error) else 1)


def _encode_error(error: Exception | None, types: Sequence[type[Exception]]) -> np.ndarray:
  """Returns type index and text of an error, uint8 [_ERROR_BYTES]; zeros without an error."""
  message = np.zeros(_ERROR_BYTES, np.uint8)
  if error is not None:
    index = next(index for index, kind in enumerate(types) if isinstance(error, kind))
    # A character takes at most 6 bytes in json.
    text = json.dumps([index, str(error)[: _ERROR_BYTES // 8]]).encode()
    message[: len(text)] = np.frombuffer(text, np.uint8)
  return message


def _create_marker(folder: Path) -> str:
  """Creates the folder, and a file that all processes must see; returns its name, or ''."""
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_count() == 1:
    return ""
  marker = f".{uuid.uuid4().hex}"
  (folder / marker).touch()
  return marker


def _check_writable(folder: Path, marker: str) -> None:
  tempfile.TemporaryFile(dir=folder).close()
  deadline = time.monotonic() + VISIBLE_SECONDS
  while marker and not (folder / marker).exists():
    if time.monotonic() > deadline:
      raise OSError(
        f"folder: expected {folder} to be the same on all hosts, got another one here than on "
        "process 0: use a shared one"
      )
    time.sleep(1)
