"""Stops training at SIGTERM, which a cluster sends before it takes a machine away."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

from distill_jax.types import TrainState

# One counter for the process, not one for each training: jax stops all processes at one number,
# which must come.
_SYNC_POINTS = itertools.count(1)


class Interrupted(SystemExit):
  """Raised where training stopped because of SIGTERM; uncaught, the process exits with 143.

  Attributes:
    state: the train state of that moment; None: training was over already.
  """

  def __init__(self, state: TrainState | None = None):
    super().__init__(128 + signal.SIGTERM)
    self.state = state

  def __str__(self) -> str:
    after = "" if self.state is None else f" after step {int(self.state.step)}"
    return f"SIGTERM: training stopped{after}; with a folder, the same call resumes it"


class Interruption:
  """A SIGTERM handler while a `with` block runs; the old handler is restored at its end.

  With one process, the signal is noted at any moment; not in a thread other than the main one,
  since Python lets only that one handle signals. With several processes, `jax.distributed` notes it
  on any of them, and makes all of them stop after the same step.
  """

  def __enter__(self) -> "Interruption":
    self._received = False
    self._handles = False
    self._old_handler = None
    self._several = jax.process_count() > 1
    if not self._several and threading.current_thread() is threading.main_thread():
      self._handles = True
      self._old_handler = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, kind, *_) -> None:
    """Raises `Interrupted` for a signal after the last `at`, unless there is another error."""
    if self._handles:
      handler = signal.SIG_DFL if self._old_handler is None else self._old_handler
      signal.signal(signal.SIGTERM, handler)
    if self._received and kind is None:
      raise Interrupted

  def at(self) -> bool:
    """Returns whether to stop after this step; every process calls it after each step."""
    if self._several and multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS)):
      self._received = True
    return self._received

  def _note(self, *_) -> None:
    self._received = True
