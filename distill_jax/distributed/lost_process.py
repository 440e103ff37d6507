"""Recognizes that a run has lost one of its processes, and ends the others with one exit code."""

import ctypes
import functools
import os
import re
import signal
import sys

import jax

LOST_PROCESS_CODE = 75
"""Exit code of a process that lost another one: the same command may be tried again."""

# Gloo (CPU) and NCCL (GPU) report through types that depend on the call: ValueError, too.
_LOST = re.compile(
  r"\bgloo\b|\bNCCL\b|coordination.?service|connection (reset|closed) by peer|heartbeat"
  r"|^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): |barrier timed out",
  re.IGNORECASE,
)
# These a program causes by itself, and the same command would again.
_OWN_FAULT = re.compile(r"^(RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|NOT_FOUND)\b")
_handlers: list[object] = []


def is_lost_process(error: BaseException) -> bool:
  """Returns whether an error, or one that caused it, tells that another process is gone."""
  cause: BaseException | None = error
  while cause is not None:
    if _tells_loss(cause):
      return True
    cause = cause.__cause__ or cause.__context__
  return False


def exit_at_abort() -> None:
  """Lets SIGABRT end this process with `LOST_PROCESS_CODE`.

  jax aborts where the first process is gone, where another one sends no heartbeats, and where not
  all have come in time. It has no other way to be told: a callback of Python's for it
  (`missed_heartbeat_callback`) raises std::bad_cast.
  """
  if sys.platform == "win32" or _handlers:
    return
  # A function of Python's own would begin with the handler of a signal that is pending, and may end
  # there. The number of the signal is not read.
  handler = ctypes.CFUNCTYPE(None)(functools.partial(os._exit, LOST_PROCESS_CODE))
  _handlers.append(handler)  # C does not keep it alive.
  install = ctypes.CDLL(None).signal
  # Not signal.signal: its handlers run later, in the main thread, which may wait for a process.
  install.argtypes = [ctypes.c_int, type(handler)]
  install.restype = ctypes.c_void_p
  install(signal.SIGABRT, handler)


def _tells_loss(error: BaseException) -> bool:
  text = str(error)
  if _LOST.search(text):
    return True
  if isinstance(error, TimeoutError):  # Orbax: another process did not come; a disk's has a number.
    return error.errno is None
  return isinstance(error, jax.errors.JaxRuntimeError) and not _OWN_FAULT.search(text)
