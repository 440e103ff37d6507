"""SIGTERM, which a cluster sends before it takes a machine away: training saves, and leaves with 143."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

from distill_jax.types import TrainState

_ASKED = itertools.count(
  1
)  # of the process, not of a training: jax stops all at one number, which must come


class Interrupted(SystemExit):
  """Training stopped because of SIGTERM; not caught, the process ends with 143, as a shell says of SIGTERM.

  Attributes:
    state: the train state of that moment; None where training was over already.
  """

  def __init__(self, state: TrainState | None = None):
    super().__init__(128 + signal.SIGTERM)
    self.state = state

  def __str__(self) -> str:
    after = "" if self.state is None else f" after step {int(self.state.step)}"
    return f"SIGTERM came, and training stopped{after}; where it has a folder, the same call goes on there"


class Interruption:
  """Tells the loop of steps that SIGTERM came; the signal's old handler is back when the `with` block is left.

  One process: the signal is noted, whatever the step is doing; not in a thread other than the main one, since Python
  lets only that one handle signals. Several processes: `jax.distributed` notes it on any of them, and tells all of
  them to stop after the same step.
  """

  def __enter__(self) -> "Interruption":
    self._came, self._handles, self._old = False, False, None
    self._together = jax.process_count() > 1
    if not self._together and threading.current_thread() is threading.main_thread():
      self._handles, self._old = True, signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, kind, *_) -> None:
    """Raises `Interrupted` for a signal that came after the last `at`, unless an error is on its way."""
    if self._handles:
      signal.signal(signal.SIGTERM, signal.SIG_DFL if self._old is None else self._old)
    if self._came and kind is None:
      raise Interrupted

  def at(self) -> bool:
    """Whether to save and stop after this step. Ask after each step; several processes ask after the same ones."""
    if self._together and multihost_utils.reached_preemption_sync_point(next(_ASKED)):
      self._came = True
    return self._came

  def _note(self, *_) -> None:
    self._came = True
