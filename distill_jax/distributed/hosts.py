"""What the processes of one run agree on: without `jax.distributed` there is one, and nothing is asked."""

import json
import os
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

HEARTBEAT = (
  10  # seconds without a sign of life after which a process counts as dead; jax waits for 100
)
LEAVE = 3600  # seconds that the others wait at the end for the one that writes the report
SEEN = 10  # seconds after which a new file shows on all hosts: mounts remember what was not there
LOST = 75  # the exit code of a process that lost another one: the same command may be tried again
_ROOM = 2000  # bytes of an error's text that the other processes are told


def join(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """`jax.distributed.initialize`, for a run that notices within 15 seconds that one of its processes has died.

  To be called before anything else uses jax. On TPU pods, under SLURM and Open MPI jax finds the arguments itself.
  From then on an error that nobody catches ends the process at once (`leave`).

  Args:
    coordinator_address: HOST:PORT, where process 0 is going to listen.
    num_processes: how many there are.
    process_id: which of them this is, from 0.

  Raises:
    ValueError: some of the three are given, but not all; or one is out of its range.
  """
  given = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(f"expected all of {', '.join(given)}, or none; missing: {', '.join(missing)}")
  if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
    raise ValueError(f"process_id: expected 0 to {num_processes - 1}, got {process_id}")
  jax.distributed.initialize(
    coordinator_address,
    num_processes,
    process_id,
    heartbeat_timeout_seconds=HEARTBEAT,
    shutdown_timeout_seconds=LEAVE,
  )
  sys.excepthook = _fail
  # Processes find each other in their first collective, and wait 30 s for one another there: they are together now.
  run_on_all(lambda: None)


def abort(code: int) -> NoReturn:
  """Ends this process because of an error that the others may not have: they notice, and end too.

  At the end of a process jax waits for all others; those would wait in the next step for this one.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _fail(kind, error, trace) -> None:
  sys.__excepthook__(kind, error, trace)
  abort(LOST if issubclass(kind, jax.errors.JaxRuntimeError) else 1)


def assert_equal(what: str, value: Any) -> None:
  """Refuses processes that were not given the same.

  Args:
    what: of which there should be one.
    value: what json can hold.

  Raises:
    ValueError: this process' value is not that of the first, or another's is not.
  """
  if jax.process_count() == 1:
    return
  common, own = run_on_first(lambda: value), json.loads(json.dumps(value))

  def compare():
    if own != common:
      raise ValueError(
        f"the processes have not the same {what}: {_shown(own)} here, {_shown(common)} on process 0"
      )

  run_on_all(compare)


def _shown(value: Any) -> str:
  return json.dumps(value)[:100]


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def run_on_first(action: Callable[[], Any]) -> Any:
  """Runs `action` on the first process and gives its result to all. All call it, in the same order.

  Args:
    action: gives what json can hold. It must not wait for other processes.

  Raises:
    Exception: what `action` raised, on every process (as the built-in type nearest to it elsewhere).
  """
  if jax.process_count() == 1:
    return action()
  result = run_on_all(lambda: action() if is_first() else None)
  text = json.dumps(result).encode()
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  padded = np.zeros(length, np.uint8)
  if is_first():
    padded[:] = np.frombuffer(text, np.uint8)
  return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


def run_on_all(action: Callable[[], Any], *, errors: Sequence[type[Exception]] = ()) -> Any:
  """Runs `action` on every process; what one of them raises, all raise, so that none waits for one that has ended.

  Args:
    action: must not wait for other processes.
    errors: what it may raise besides built-in errors, so that it is the same elsewhere; made of a text.

  Returns:
    This process' result.
  """
  if jax.process_count() == 1:
    return action()
  result, error = None, None
  try:
    result = action()
  except Exception as raised:
    error = raised
  kinds = (*errors, OSError, ValueError, MemoryError, RuntimeError, Exception)
  told = np.zeros(_ROOM, np.uint8)
  if error is not None:
    kind = next(number for number, kind in enumerate(kinds) if isinstance(error, kind))
    text = json.dumps([kind, str(error)[: _ROOM // 8]]).encode()  # at most 6 bytes a character
    told[: len(text)] = np.frombuffer(text, np.uint8)
  everywhere = multihost_utils.process_allgather(told)
  if error is not None:
    raise error
  for process, row in enumerate(everywhere):
    if row[0]:
      kind, text = json.loads(bytes(row).rstrip(b"\0"))
      raise kinds[kind](f"process {process}: {text}")
  return result


def run_in_turn(action: Callable[[], Any]) -> Any:
  """Runs `action` on the first process, then on the others: what it prepares on a shared disk, it prepares once.

  Returns:
    This process' result.
  """
  made = run_on_all(lambda: action() if is_first() else None)
  others = run_on_all(lambda: None if is_first() else action())
  return made if is_first() else others


def share(folder: Path) -> None:
  """Makes a folder, and tries it: every process must be able to write there and see what the others write.

  Raises:
    OSError: it cannot be made or written, or is not the same folder for all.
  """
  mark = run_on_first(lambda: _mark(folder))
  try:
    run_on_all(lambda: _look(folder, mark))
  finally:
    if mark and is_first():
      (folder / mark).unlink(missing_ok=True)


def _mark(folder: Path) -> str:
  """The name of a new file that all must see."""
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_count() == 1:
    return ""
  mark = f".{uuid.uuid4().hex}"
  (folder / mark).touch()
  return mark


def _look(folder: Path, mark: str) -> None:
  tempfile.TemporaryFile(dir=folder).close()
  deadline = time.monotonic() + SEEN
  while mark and not (folder / mark).exists():
    if time.monotonic() > deadline:
      raise OSError(
        f"{folder} is another folder here than on process 0: choose one that all hosts share"
      )
    time.sleep(1)
