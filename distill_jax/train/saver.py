"""Saves a run while it trains: checkpoints in a folder, or the best variables in memory without
one.
"""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.storage import files, folders, retention, sealed_json
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.lease import Lease
from distill_jax.storage.retention import score_key
from distill_jax.train.optimizers import evaluation_variables
from distill_jax.types import TrainState, Variables

_CHECKPOINTS = "checkpoints"


class Saver:
  """Checkpoints in a leased folder, or the best variables in memory without one. Use it as a
  context manager.

  Attributes:
    folder: absolute, or None.
    notes: those that were saved with the state that `restore` returned; {} without one.
  """

  def __init__(
    self,
    folder: str | Path | None,
    best: tuple[str, str],
    identity: Mapping[str, str | int | float],
    settings: Mapping[str, str] | None = None,
  ):
    """Opens the folder.

    Args:
      folder: of the run; None: nothing is written.
      best: the score that chooses the best variables, and 'max' or 'min'.
      identity: what must be equal for a run to resume.
      settings: what is said where it differs; see `Checkpoints`.

    Raises:
      LeaseError: another process trains in the folder.
      ValueError: the folder is a URL, or part of another run's checkpoints.
    """
    self.folder = None if folder is None else folders.resolve_run(folder, "checkpoints")
    self.notes: Mapping[str, Any] = {}
    self._best = best
    self._best_key: tuple[float, float] | None = None
    self._best_variables: tuple[Variables, Variables, int] | None = None
    self._checkpoints: Checkpoints | None = None
    with contextlib.ExitStack() as stack:
      if self.folder is not None:
        _check_level(self.folder)
        self._lease = stack.enter_context(Lease(self.folder))
        checkpoints = Checkpoints(
          self.folder / _CHECKPOINTS, best=best, identity=identity, settings=settings
        )
        self._checkpoints = stack.enter_context(checkpoints)
      self._stack = stack.pop_all()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._stack.__exit__(*error)

  def restore(self, state: TrainState) -> TrainState:
    """Returns the last saved state, with the placement of `state`; `state` itself where there is
    none.
    """
    restored = None if self._checkpoints is None else self._checkpoints.restore(state)
    if self._checkpoints is None or restored is None:
      return state
    self.notes = self._checkpoints.seals()[int(restored.step)]["notes"]
    return restored

  def save(
    self,
    state: TrainState,
    scores: Mapping[str, float] | None,
    position: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves a state; of equal scores the one of lower loss is the best, then the later one.

    Args:
      state: of the student.
      scores: of an evaluation; None: there was none.
      position: of this process in its data, JSON values (`Pipeline.get_state`); None: it has none.
      notes: what else is stored with the state, JSON values, the same on all processes.
    """
    if self._checkpoints is not None:
      self._lease.check()
      if position is not None:
        self._save_position(int(state.step), position)
      self._checkpoints.save(state, metrics=scores, notes=notes)
    elif scores is not None:
      key = score_key(scores, self._best)
      if key is not None and (self._best_key is None or key >= self._best_key):
        self._best_key = key
        variables, learned = jax.tree.map(jnp.copy, all_variables(state))
        self._best_variables = variables, learned, int(state.step)

  def position(self, step: int) -> dict[str, Any] | None:
    """Returns this process's position in its data after a step; None where none was saved."""
    return self._positions().get(str(step))

  def _save_position(self, step: int, position: Mapping[str, Any]) -> None:
    positions = self._positions() | {str(step): dict(position)}
    # As many as there may be checkpoints to resume at.
    latest = dict(sorted(positions.items(), key=lambda item: int(item[0]))[-4:])
    files.write(self._positions_path(), sealed_json.dumps(latest))

  def _positions(self) -> dict[str, Any]:
    if self.folder is None or not self._positions_path().exists():
      return {}
    try:
      return sealed_json.read(self._positions_path())
    except ValueError as error:
      text = f"skipping a position in the data, the batches are read again: {error}"
      warnings.warn(text, RuntimeWarning, stacklevel=2)
      return {}

  def _positions_path(self) -> Path:
    assert self.folder is not None
    return self.folder / f"data_position_{jax.process_index()}.json"

  def wait(self) -> None:
    """Returns when everything that was saved is on disk."""
    if self._checkpoints is not None:
      self._checkpoints.wait()

  def scores(self) -> dict[int, dict[str, float]]:
    """Returns the scores of the evaluations that are stored with a checkpoint, by step."""
    seals = {} if self._checkpoints is None else self._checkpoints.seals()
    return {step: seal["metrics"] for step, seal in seals.items() if seal["metrics"]}

  def best_variables(self, state: TrainState) -> tuple[Variables, Variables, int]:
    """Returns the student's variables from the best evaluation, the objective's, and their step;
    those of `state`, with a warning, where no evaluation has a finite score.
    """
    if self._checkpoints is not None:
      self._checkpoints.wait()
      if self._checkpoints.best_step is not None:
        best = self._checkpoints.restore(state, step="best") or state
        return *all_variables(best), int(best.step)
    elif self._best_variables is not None:
      return self._best_variables
    warnings.warn(
      f"best: expected a finite {self._best[0]!r} from an evaluation, got none: the last weights "
      "are returned; look at the labels and the losses in the log",
      stacklevel=2,
    )
    return *all_variables(state), int(state.step)


def all_variables(state: TrainState) -> tuple[Variables, Variables]:
  """Returns the variables of a state that an evaluation reads: the student's, the objective's."""
  learned = Variables(state.params["objective"], state.model_state["objective"])
  return evaluation_variables(state), learned


def _check_level(folder: Path) -> None:
  """Checks that a folder is not inside the checkpoints of a run: it would train from scratch."""
  for path in (folder, *folder.parents):
    if path.name == _CHECKPOINTS and path.is_dir() and retention.step_folders(path):
      raise ValueError(
        f"checkpoints: expected the folder of a run, got {folder} inside of its checkpoints: pass "
        f"{path.parent}"
      )
