"""Saves and restores the checkpoints of a training run: sealed when written, checked when read.

`serialization.py` writes and reads the arrays, `seal.py` detects corrupt ones, `retention.py`
decides what stays in the folder, and `run_settings.py` describes what made them.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from distill_jax.distributed import equality, hosts
from distill_jax.errors import join_first
from distill_jax.storage import files, folders, retention, seal, serialization
from distill_jax.types import TrainState


class Checkpoints:
  """The latest checkpoints of one training run and its best one, in one folder with one writer.

  Checkpoints are written in the background. An error there is raised by the next `save`, `wait` or
  `close`; earlier checkpoints stay. Use it as a context manager, or call `close`.

  The processes of one run share the folder: each makes the same calls in the same order, and writes
  and reads the parts of the arrays that are on its devices. What is done once (scanning, moving,
  removing) the first process does.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    identity: seal.Identity | None = None,
    settings: Mapping[str, str] | None = None,
    keep: int = 2,
    best: retention.Best | None = None,
    read_only: bool = False,
  ):
    """Opens the folder; a writer creates it, checks it, and removes what killed runs left.

    Args:
      folder: local or mounted; a relative path is resolved now.
      identity: values that must not change when the run resumes (the seed of the data, for
        example): stored with each checkpoint and compared by `restore`. None: nothing is compared.
      settings: values that may change, but change the results (`run_settings.describe`): `restore`
        warns once of those that differ. None: nothing is compared.
      keep: number of latest checkpoints that stay, at least 1.
      best: `(metric, "max" or "min")`: the checkpoint with the best finite value also stays, of
        equal ones see `retention.score_key`. None: only the latest stay.
      read_only: create, write and remove nothing (for a report, or to evaluate a running job).

    Raises:
      ValueError: `keep` or `best` is not as above, or the folder is a URL or has a "[".
      FileNotFoundError: read-only, and the folder does not exist.
      OSError: the folder cannot be created or written, or is not the same for all processes.
    """
    if keep < 1:
      raise ValueError(f"keep: expected at least 1, got {keep}")
    if best is not None and best[1] not in ("max", "min"):
      raise ValueError(f"best: expected (metric, 'max' or 'min'), got {best}")
    self.folder = folders.resolve_run(folder, "folder")
    self._identity = identity
    self._settings = settings
    self._keep = keep
    self._best = best
    self._is_writer = not read_only
    self._step_in_progress: int | None = None
    self._save_in_progress: serialization.Save | None = None
    self._seals: dict[int, dict[str, Any]] = {}
    self._corrupt: dict[int, str] = {}
    self._known_changes = {""}
    if read_only:
      hosts.run_on_all(self._check_exists)
    else:
      self._prepare_folder()
    self._scan()

  def save(
    self,
    state: TrainState,
    *,
    metrics: Mapping[str, float] | None = None,
    notes: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves the state as the checkpoint of its step; `state` may be donated right after.

    A step that is stored already, bit for bit, is not written again unless it brings the first
    metrics. `notes` are JSON values that belong to the state.

    Raises:
      ValueError: read-only; the step is before the latest checkpoint; a leaf would not come back
        the same; the processes of the run do not hold the same values.
      RuntimeError: this checkpoint, or the one before it, could not be written.
    """
    if not self._is_writer:
      raise ValueError(
        f"folder: expected {self.folder} open for writing, got it read-only or closed"
      )
    self.wait()
    metadata = seal.make_seal(state, metrics or {}, self._identity or {}, self._settings, notes)
    new_seal = metadata["seal"]
    step = new_seal["step"]
    equality.assert_equal(f"state after step {step}", metadata["digest"])
    stored = self._seals.get(step)
    if stored and stored["leaves"] == new_seal["leaves"] and (stored["metrics"] or not metrics):
      return
    latest = max(self._seals, default=step)
    if step < latest:
      raise ValueError(
        f"state: step {step} is before checkpoint {latest} of {self.folder}: restore that one first"
      )
    hosts.run_on_first(lambda: self._make_way(step))
    self._seals[step] = new_seal
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    self._step_in_progress = step
    with self._undo_on_error():
      path = self.folder / str(step)
      self._save_in_progress = serialization.start_save(path, state, metadata)

  def restore(self, like: TrainState, *, step: int | str | None = None) -> TrainState | None:
    """Returns the newest valid checkpoint, in the shardings of `like`; None if there is none.

    A corrupt checkpoint is skipped with a RuntimeWarning, and the one before it is used.

    Args:
      like: the state of a fresh start: arrays, or `ShapeDtypeStruct`s (without a sharding: on the
        first device of each process).
      step: None: the newest; a number: this one only; 'best': the best one (or the next best).

    Raises:
      ValueError: names, shapes, dtypes or the identity differ from the checkpoint's, with a line
        for each difference; there is no such step; the checkpoints are in another folder nearby.
      RuntimeError: all checkpoints are corrupt (training never starts from scratch silently).
    """
    self._refresh()
    candidates = self._candidates(step)
    for candidate in candidates:
      try:
        return self._load(candidate, like)
      except seal.CorruptFile as error:
        self._seals.pop(candidate, None)
        self._corrupt[candidate] = str(error)
        text = f"skipping the corrupt checkpoint {self.folder / str(candidate)}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    if not candidates:
      return None
    reasons = "".join(f"\n  {step}: {reason}" for step, reason in sorted(self._corrupt.items()))
    raise RuntimeError(
      f"folder: none of the {len(candidates)} checkpoints in {self.folder} can be read; to start "
      f"from scratch, move it away:{reasons}"
    )

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints with a valid seal, in order."""
    self._refresh()
    return sorted(self._seals)

  @property
  def best_step(self) -> int | None:
    """The step with the best finite value of `best` (`retention.score_key`); None: no step."""
    self._refresh()
    return next(iter(retention.rank_steps(self._seals, self._best)), None)

  def seals(self) -> dict[int, dict[str, Any]]:
    """Returns the valid seals by step, in order; 'metrics' and 'notes' are as they were saved."""
    return {step: self._seals[step] for step in self.steps()}

  def wait(self) -> None:
    """Returns when the checkpoint in progress is on disk.

    Raises:
      RuntimeError: it could not be written; earlier ones are still stored.
    """
    if self._step_in_progress is None or self._save_in_progress is None:
      return
    step = self._step_in_progress
    with self._undo_on_error():
      self._save_in_progress.result()
      hosts.run_on_first(lambda: self._complete(step))
    self._step_in_progress = None
    self._save_in_progress = None
    retained = retention.retained_steps(self._seals, self._keep, self._best)
    self._seals = {step: self._seals[step] for step in retained}
    self._corrupt = {}
    hosts.run_on_first(lambda: retention.remove_other_steps(self.folder, retained))

  def close(self) -> None:
    """Calls `wait`, then releases the folder."""
    try:
      self.wait()
    finally:
      self._is_writer = False

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not None and jax.process_count() > 1:
      # The other processes may not be here to check it together; Orbax completes it all the same.
      self._step_in_progress = None
      if self._save_in_progress is not None:
        self._save_in_progress.result()
    self.close()

  def _candidates(self, step: int | str | None) -> list[int]:
    """Returns the steps that `restore` tries, in this order."""
    stored = sorted({*self._seals, *self._corrupt}, reverse=True)
    hint = ""
    if not stored:
      hint = hosts.run_on_first(lambda: retention.hint_at_checkpoints(self.folder))
    if hint or (isinstance(step, int) and step not in stored):
      which = "a checkpoint" if step is None else f"checkpoint {step}"
      raise ValueError(f"folder: expected {which} in {self.folder}, got steps {stored[::-1]}{hint}")
    if step == "best":
      ranked = retention.rank_steps(self._seals, self._best)
      if self._seals and not ranked:
        raise ValueError(
          f"best: expected a checkpoint with a finite value of {self._best}, got none in "
          f"{self.folder}"
        )
      return [*self._corrupt, *ranked]
    return stored if step is None else [int(step)]

  def _load(self, step: int, like: TrainState) -> TrainState:
    if step in self._corrupt:
      raise seal.CorruptFile(self._corrupt[step])
    path = retention.step_folders(self.folder)[step]
    stored = self._seals[step]
    hosts.run_on_all(lambda: seal.check_usable(path, stored, like, self._identity, self._settings))
    state = hosts.run_on_all(
      lambda: serialization.load_state(path, like), errors=[seal.CorruptFile]
    )
    seal.check_contents(stored, state)
    changes = join_first(seal.changed_settings(stored, self._settings), "; ")
    if changes not in self._known_changes:
      self._known_changes.add(changes)
      text = f"{path} was saved under other settings, results may differ: {changes}"
      warnings.warn(text, RuntimeWarning, stacklevel=3)
    return state

  def _refresh(self) -> None:
    if self._is_writer:
      self.wait()
    else:
      self._scan()  # Another process may have written since.

  def _scan(self) -> None:
    scan = hosts.run_on_first(lambda: retention.read_seals(self.folder))
    self._seals, self._corrupt = map(dict, scan)

  def _check_exists(self) -> None:
    if not self.folder.is_dir():
      hint = retention.hint_at_checkpoints(self.folder.parent)
      raise FileNotFoundError(f"folder: expected checkpoints, {self.folder} does not exist{hint}")

  def _prepare_folder(self) -> None:
    try:
      hosts.make_shared_folder(self.folder)
    except OSError as error:
      text = f"folder: expected a writable checkpoint folder, got {self.folder}: {error}"
      raise OSError(text) from error
    hosts.run_on_first(lambda: serialization.remove_unfinished(self.folder))
    hosts.run_on_first(lambda: retention.restore_replaced(self.folder))

  def _make_way(self, step: int) -> None:
    """Moves aside what is stored at this step, or removes it if it is corrupt."""
    path = self.folder / str(step)
    if step in self._corrupt:
      retention.remove(path)
    retention.move_aside(self.folder, step)

  def _complete(self, step: int) -> None:
    # What it replaces is removed only after this check: Orbax also commits a checkpoint whose parts
    # it failed to merge, and one without a seal if it failed to read back its own metadata.
    serialization.load_seal(self.folder / str(step), step)
    retention.drop_replaced(self.folder, step)

  @contextlib.contextmanager
  def _undo_on_error(self) -> Iterator[None]:
    """Restores the folder as it was before a failed write, and raises a RuntimeError."""
    try:
      yield
    except Exception as error:
      step = self._step_in_progress
      self._step_in_progress = None
      self._save_in_progress = None
      space = files.missing_space(error, self.folder, self._bytes)
      text = f"checkpoint {step} of {self.folder} was not written{space}"
      if jax.process_count() > 1:
        # The others may have written their parts and wait for this one: the next start cleans up.
        raise RuntimeError(f"{text}: {error}") from error
      retention.remove(self.folder / str(step))
      serialization.remove_unfinished(self.folder)
      retention.restore_replaced(self.folder)
      self._scan()
      raise RuntimeError(f"{text} (still stored: {sorted(self._seals)}): {error}") from error
