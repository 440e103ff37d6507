"""What a run leaves while it goes: checkpoints in a folder, or the best variables in memory where there is none."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.lease import Lease
from distill_jax.types import TrainState, Variables


class Saver:
  """Checkpoints in a folder, or the best variables in memory where there is none."""

  def __init__(self, folder, best, identity):
    self._best, self._score, self._variables = best, None, None
    self.folder = None if folder is None else Path(folder).resolve()
    self._saved = None
    if self.folder is not None:
      with contextlib.ExitStack() as held:
        self._lease = held.enter_context(Lease(self.folder))
        self._saved = held.enter_context(
          Checkpoints(self.folder / "checkpoints", best=best, identity=identity)
        )
        self._held = held.pop_all()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._saved is not None:
      self._held.__exit__(*error)

  def restore(self, state: TrainState) -> TrainState:
    found = self._saved.restore(state) if self._saved is not None else None
    return state if found is None else found

  def save(self, state: TrainState, scores: Mapping[str, float] | None) -> None:
    if self._saved is not None:
      self._lease.check()
      self._saved.save(state, metrics=scores)
    elif scores is not None:
      name, direction = self._best
      score = scores[name] if direction == "max" else -scores[name]
      if math.isfinite(score) and (self._score is None or score > self._score):
        self._score = score
        self._variables = Variables(*jax.tree.map(jnp.copy, tuple(student_of(state))))

  def wait(self) -> None:
    """Returns when what was saved is on disk."""
    if self._saved is not None:
      self._saved.wait()

  def best_variables(self, state: TrainState) -> Variables:
    if self._saved is not None:
      self._saved.wait()
      state = self._saved.restore(state, step="best") or state
    elif self._variables is not None:
      return self._variables
    return student_of(state)


def student_of(state: TrainState) -> Variables:
  """The student's variables."""
  return Variables(state.params["student"], state.model_state["student"])
