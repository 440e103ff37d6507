"""Stops training at Ctrl-C, and at SIGTERM, which a cluster sends before it takes a machine."""

import _thread
import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from distill_jax.types import TrainState

# One counter for the process, not one for each training: jax stops all processes at one number,
# which must come.
_SYNC_POINTS = itertools.count(1)
_NOTICE = b"\nCtrl-C: training stops after this step; Ctrl-C again ends it at once, unsaved.\n"


class Interrupted(SystemExit):
  """Raised where training stopped because of a signal.

  Uncaught, the process exits with 143 after SIGTERM and with 130 after Ctrl-C.

  Attributes:
    state: the train state of that moment; None: training was over already.
    signal: SIGTERM or SIGINT.
  """

  def __init__(self, state: TrainState | None = None, number: int = signal.SIGTERM):
    super().__init__(128 + number)
    self.state = state
    self.signal = signal.Signals(number)

  def __str__(self) -> str:
    name = "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name
    after = "" if self.state is None else f" after step {int(self.state.step)}"
    return f"{name}: stopped{after}"


class Interruption:
  """Handles SIGTERM and Ctrl-C while a `with` block runs; the old handlers come back at its end.

  With one process, a signal is noted at any moment; not in a thread other than the main one, since
  Python lets only that one handle signals. A second Ctrl-C raises KeyboardInterrupt; a handler of
  the caller's own for it stays. With several processes, `jax.distributed` notes SIGTERM on any of
  them, and makes all of them stop after the same step; Ctrl-C raises KeyboardInterrupt.
  """

  def __enter__(self) -> "Interruption":
    self._received: int | None = None
    self._old_handlers: dict[int, Any] = {}
    self._several = jax.process_count() > 1
    if not self._several and threading.current_thread() is threading.main_thread():
      self._old_handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
      if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        self._old_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, kind, *_) -> None:
    """Raises `Interrupted` for a signal that nothing answered, unless there is another error."""
    for number, handler in self._old_handlers.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if self._received is not None and kind is None:
      raise Interrupted(number=self._received)

  def at(self) -> bool:
    """Returns whether to stop after this step; every process calls it after each step."""
    if self._several and multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS)):
      self._received = signal.SIGTERM
    return self._received is not None

  def answer(self, state: TrainState, *, saved: bool) -> None:
    """Raises `Interrupted` with the state; not after Ctrl-C where it was not saved.

    The caller then returns what it has: it would else be lost.
    """
    number = self._received
    assert number is not None
    if saved or number != signal.SIGINT:
      raise Interrupted(state, number)
    self._received = None

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._received = number
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      os.write(2, _NOTICE)  # print may be interrupted while it holds the stream


@contextlib.contextmanager
def saying_why() -> Iterator[None]:
  """Lets SIGTERM outside of training raise `Interrupted`, and Ctrl-C too, for a last line."""
  main = threading.current_thread() is threading.main_thread()
  old = signal.signal(signal.SIGTERM, _raise) if main else None
  hook = sys.unraisablehook
  sys.unraisablehook = functools.partial(_send_again, hook)
  try:
    yield
  except KeyboardInterrupt:
    raise Interrupted(number=signal.SIGINT) from None
  finally:
    sys.unraisablehook = hook
    if main:
      signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def _raise(number: int, frame: FrameType | None) -> None:
  del frame
  raise Interrupted(number=number)


def _send_again(hook: Callable[[Any], Any], unraisable: Any) -> None:
  """Sends a signal again whose exception Python ignored, as in jax's callback of the garbage
  collector: the command would else run on.
  """
  error = unraisable.exc_value
  if isinstance(error, KeyboardInterrupt):
    number = signal.SIGINT
  elif isinstance(error, Interrupted):
    number = error.signal
  else:
    hook(unraisable)
    return
  # Later: this hook is such a place too. A threading.Timer would make it wait for its thread.
  _thread.start_new_thread(_send, (number,))


def _send(number: int) -> None:
  time.sleep(0.1)
  os.kill(os.getpid(), number)
