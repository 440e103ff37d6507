"""Checkpoints of a training run: sealed when written, checked when read.

The only file that knows Orbax. Orbax commits a checkpoint by renaming its directory, so a killed process
leaves none half written; but it does not notice flipped bits or renamed directories, and casts other dtypes
silently. So each checkpoint carries a seal (`seal.py`).
"""

import contextlib
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from distill_jax.distributed import hosts
from distill_jax.storage import seal
from distill_jax.storage.student import export_student, load_student
from distill_jax.types import TrainState

__all__ = ["Checkpoints", "export_student", "load_student"]

_ASIDE, _REMOVED = ".replaced", ".removed"


class Checkpoints:
  """The latest checkpoints of one training run and its best one, in one folder. One writer at a time (`Lease`).

  Writing goes on in the background. An error in it is raised by the next `save`, `wait` or `close`; what was
  saved before stays. Use it as a context manager, or call `close`.

  The processes of one run share the folder: each makes the same calls in the same order, and writes and reads the
  parts of the arrays that lie on its devices. What is done once (finding, moving, removing) the first one does.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    identity: seal.Identity | None = None,
    keep: int = 2,
    best: tuple[str, str] | None = None,
    read_only: bool = False,
  ):
    """Open the folder; a writer makes it, tries to write in it, and clears what killed runs left behind.

    Args:
      folder: local or mounted; relative to the working directory of this moment.
      identity: what must not change when the run is resumed (the seed of the data, say): stored with each
        checkpoint and compared by `restore`. None: nothing is compared.
      keep: how many of the latest checkpoints stay.
      best: `(metric, "max" or "min")`: the checkpoint with the best finite value stays too, of equals the
        earliest.
      read_only: write, make and clear nothing (for a report, or an evaluation beside the running training).

    Raises:
      ValueError: `keep` or `best` is not as above, or the folder is a URL.
      FileNotFoundError: read-only, and there is no such folder.
      OSError: the folder cannot be made or written, or is not the same for all processes.
    """
    if keep < 1:
      raise ValueError(f"keep must be at least 1, got {keep}")
    if best is not None and best[1] not in ("max", "min"):
      raise ValueError(f"best must be (metric, 'max' or 'min'), got {best}")
    if "://" in str(folder):
      raise ValueError(f"folder must be a local or mounted path, got the URL {folder}")
    self.folder = Path(folder).absolute()
    self._identity, self._keep, self._best = identity, keep, best
    self._writer: Any = None
    self._writing: int | None = None
    self._seals: dict[int, dict[str, Any]] = {}
    self._damaged: dict[int, str] = {}
    if not read_only:
      self._open_writer()
    else:
      hosts.run_on_all(self._check_there)
    self._scan()

  def save(self, state: TrainState, *, metrics: Mapping[str, float] | None = None) -> None:
    """Save the state as the checkpoint of its step; `state` may be donated right after.

    A step that is there already, bit for bit, is not written again unless it brings the first metrics.

    Raises:
      ValueError: read-only; the step lies before the latest checkpoint; a leaf would not come back the same; the
        processes of the run do not hold the same values.
      RuntimeError: this checkpoint, or the one before it, could not be written.
    """
    if self._writer is None:
      raise ValueError(f"{self.folder} is open for reading only, or closed")
    self.wait()
    sealed = seal.make(state, metrics or {}, self._identity or {})
    new, step = sealed["seal"], sealed["seal"]["step"]
    hosts.assert_equal(f"state after step {step}", sealed["digest"])
    old = self._seals.get(step)
    if old and old["leaves"] == new["leaves"] and (old["metrics"] or not metrics):
      return
    latest = max(self._seals, default=step)
    if step < latest:
      raise ValueError(
        f"step {step} lies before checkpoint {latest} of {self.folder}: restore it first"
      )
    self._move_aside(step)
    self._seals[step], self._writing = new, step
    with self._writes():
      # No copy: Orbax transfers to the host before it returns, and where that is only a view (CPU) jax
      # does not reuse the donated buffer while the view lives.
      self._writer.save_checkpointables_async(
        step, {"state": state}, custom_metadata=sealed, force=True
      )

  def restore(self, like: TrainState, *, step: int | str | None = None) -> TrainState | None:
    """The newest sound checkpoint, in the shardings of `like`; None where there is none at all.

    A damaged checkpoint is skipped with a RuntimeWarning, and the one before it is used.

    Args:
      like: what a fresh start would begin with: arrays, or `ShapeDtypeStruct`s (without a sharding: on the
        first device of each process).
      step: None for the newest; a number for this one only; 'best' for the best one (or the next best).

    Raises:
      ValueError: names, shapes, dtypes or the identity differ from the checkpoint's, with a line for each
        difference; there is no such step; the checkpoints lie in another folder nearby.
      RuntimeError: all checkpoints are damaged (training never starts over silently).
    """
    self._look()
    candidates = self._candidates(step)
    for candidate in candidates:
      try:
        return self._load(candidate, like)
      except seal.CorruptFile as damage:
        self._seals.pop(candidate, None)
        self._damaged[candidate] = str(damage)
        text = f"checkpoint {self.folder / str(candidate)} is damaged and is skipped: {damage}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    if not candidates:
      return None
    reasons = "".join(f"\n  {s}: {reason}" for s, reason in sorted(self._damaged.items()))
    raise RuntimeError(
      f"no sound checkpoint in {self.folder}; to start over, move it away:{reasons}"
    )

  def steps(self) -> list[int]:
    """The steps of the checkpoints with an unbroken seal, in order."""
    self._look()
    return sorted(self._seals)

  @property
  def best_step(self) -> int | None:
    """The step with the best finite value of the metric `best`, of equals the earliest."""
    self._look()
    return next(iter(self._ranked()), None)

  @property
  def best_metrics(self) -> dict[str, float] | None:
    """All metrics that were saved with the best checkpoint."""
    step = self.best_step
    return None if step is None else dict(self._seals[step]["metrics"])

  def wait(self) -> None:
    """Return when the checkpoint being written is on disk.

    Raises:
      RuntimeError: it could not be written; those before it are still there.
    """
    if self._writing is None:
      return
    step = self._writing
    with self._writes():
      self._writer.wait()
      hosts.run_on_first(lambda: self._completed(step))
    self._writing = None
    self._seals = {step: self._seals[step] for step in self._kept()}
    self._damaged = {}
    if hosts.run_on_first(self._tidy):
      self._writer.reload()

  def close(self) -> None:
    """`wait`, then release the folder."""
    if self._writer is None:
      return
    try:
      self.wait()
    finally:
      self._writer.close()
      self._writer = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not None and jax.process_count() > 1:
      self._writing = (
        None  # the others may not be here to look at it together; it is completed all the same
      )
    self.close()

  def _kept(self) -> set[int]:
    return {*sorted(self._seals)[-self._keep :], *self._ranked()[:1]}

  def _ranked(self) -> list[int]:
    name, mode = self._best or ("", "max")
    sign = -1 if mode == "max" else 1
    values = {step: body["metrics"].get(name, math.nan) for step, body in self._seals.items()}
    return sorted(
      (s for s in values if math.isfinite(values[s])), key=lambda s: (sign * values[s], s)
    )

  def _candidates(self, step: int | str | None) -> list[int]:
    found = sorted({*self._seals, *self._damaged}, reverse=True)
    hint = "" if found else hosts.run_on_first(lambda: _hint(self.folder))
    if hint or (isinstance(step, int) and step not in found):
      wanted = "" if step is None else f" of step {step}"
      raise ValueError(f"no checkpoint{wanted} in {self.folder}; found steps {found[::-1]}{hint}")
    if step == "best":
      if self._seals and not self._ranked():
        raise ValueError(f"no checkpoint in {self.folder} has a finite value of best={self._best}")
      return [*self._damaged, *self._ranked()]
    return found if step is None else [int(step)]

  def _load(self, step: int, like: TrainState) -> TrainState:
    if step in self._damaged:
      raise seal.CorruptFile(self._damaged[step])
    hosts.run_on_all(lambda: self._check_usable(step, like))
    state = hosts.run_on_all(lambda: _read(self.folder, step, like), errors=[seal.CorruptFile])
    seal.check_contents(self._seals[step], state)
    return state

  def _check_usable(self, step: int, like: TrainState) -> None:
    body = self._seals[step]
    try:
      if self._identity is not None:
        seal.check_identity(body, self._identity)
      seal.check_fit(
        seal.layout(like), {name: (leaf[0], leaf[1]) for name, leaf in body["leaves"].items()}
      )
    except ValueError as error:
      raise ValueError(f"checkpoint {self.folder / str(step)} cannot be used: {error}") from None

  def _look(self) -> None:
    if self._writer is None:
      self._scan()  # somebody else writes
    else:
      self.wait()

  def _scan(self) -> None:
    seals, damaged = hosts.run_on_first(lambda: _seals_in(self.folder))
    self._seals, self._damaged = dict(seals), dict(damaged)

  def _check_there(self) -> None:
    if not self.folder.is_dir():
      raise FileNotFoundError(f"no checkpoint folder {self.folder}{_hint(self.folder.parent)}")

  def _open_writer(self) -> None:
    try:
      hosts.share(self.folder)
    except OSError as error:
      raise OSError(f"the checkpoint folder {self.folder} cannot be written: {error}") from error
    hosts.run_on_first(self._put_back)
    context = ocp.Context()
    context.array.saving.use_compression = (
      False  # weights hardly shrink, and reads take half the time
    )
    self._writer = ocp.training.Checkpointer(
      self.folder, context=context, cleanup_tmp_directories=True
    )
    # Orbax asks jax whether to stop at this step, from its threads too. jax agrees on the number after the last one
    # that it was asked for: where `Interruption` counts otherwise, a SIGTERM during a save would be lost.
    self._writer._manager.reached_preemption = lambda step: False

  @contextlib.contextmanager
  def _writes(self):
    """A failed write leaves everything as it was before it, and says so."""
    try:
      yield
    except Exception as error:
      step, self._writing = self._writing, None
      if jax.process_count() > 1:
        # The others may have written their parts, and wait for this one: the next start puts things right.
        raise RuntimeError(
          f"checkpoint {step} of {self.folder} was not written: {error}"
        ) from error
      _remove(self.folder / str(step))
      self._put_back()
      self._writer.reload()
      self._scan()
      still = f"still there: {sorted(self._seals)}"
      raise RuntimeError(
        f"checkpoint {step} of {self.folder} was not written ({still}): {error}"
      ) from error

  def _aside(self, step: int) -> Path:
    return self.folder / f"{step}{_ASIDE}"

  def _move_aside(self, step: int) -> None:
    """What is at this step already stays on disk until its replacement is complete."""
    if hosts.run_on_first(lambda: self._renamed(step)):
      self._writer.reload()

  def _renamed(self, step: int) -> bool:
    path = self.folder / str(step)
    there = path.exists()
    if step in self._damaged:
      _remove(path)
    elif there:
      path.rename(self._aside(step))
    return there

  def _completed(self, step: int) -> None:
    """What the checkpoint replaces is dropped only now: Orbax also commits where it fails to merge the parts."""
    _check_sealed(self.folder / str(step), step)
    _remove(self._aside(step))

  def _put_back(self) -> None:
    for aside in self.folder.glob(f"*{_ASIDE}"):
      _remove(aside.with_suffix(""))
      aside.rename(aside.with_suffix(""))

  def _tidy(self) -> bool:
    """Removes what is damaged, and neither among the latest nor the best. Returns: whether there was any."""
    for rest in self.folder.glob(f"*{_REMOVED}"):
      _try_to_remove(rest)
    kept = {str(step) for step in self._kept()}
    found = [
      path for path in self.folder.iterdir() if _step_of(path) is not None and path.name not in kept
    ]
    for path in found:
      with contextlib.suppress(OSError):  # the next time, then
        _remove(path)
    return bool(found)


def _remove(path: Path) -> None:
  """Removes a directory, if it is there: at once for whoever looks, so that nobody finds half of it."""
  gone = path.with_name(f"{path.name}-{uuid.uuid4().hex}{_REMOVED}")
  with contextlib.suppress(FileNotFoundError):
    path.rename(gone)
    _try_to_remove(gone)


def _try_to_remove(path: Path) -> None:
  with contextlib.suppress(OSError):  # `ignore_errors` lets those of closing through
    shutil.rmtree(path, ignore_errors=True)


def _seals_in(folder: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
  """The seals of the checkpoints there, by step; and what is wrong with the others."""
  seals, damaged = [], []
  for step, place in _places(folder).items():
    try:
      seals.append((step, _check_sealed(place, step)))
    except seal.CorruptFile as damage:
      damaged.append((step, str(damage)))
  return seals, damaged


def _check_sealed(path: Path, step: int) -> dict[str, Any]:
  with _reading():
    # Orbax's own reader of this file opens every array too, and mutters when one is damaged. Its writer goes on
    # without the seal where it cannot read what it had written of this file.
    stored = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]
  return seal.opened(stored, step)


def _read(folder: Path, step: int, like: TrainState) -> TrainState:
  # Without Orbax's barriers: they would be waited for in vain by a process whose part is sound.
  own = jax.process_index()
  context = ocp.Context()
  context.multiprocessing_options.primary_host = own
  context.multiprocessing_options.active_processes = {own}
  with _reading(), context:
    return ocp.load_checkpointables(
      _places(folder)[step], {"state": jax.tree.map(_abstract, like)}
    )["state"]


@contextlib.contextmanager
def _reading():
  """Whatever a reader of broken files raises means damage, except what the machine lacks."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise seal.CorruptFile(
      f"it cannot be read ({type(error).__name__}: {str(error)[:300]})"
    ) from error


def _abstract(leaf) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
    jax.local_devices()[0]
  )
  if leaf.ndim == 0 and isinstance(sharding, jax.sharding.NamedSharding):
    # Orbax gives restored scalar keys a spec of rank 1, which nothing can be restored into again.
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _places(folder: Path) -> dict[int, Path]:
  """Where each step is, in order: aside, while its replacement is not complete."""
  found = [path for path in folder.iterdir() if _step_of(path) is not None]
  found.sort(key=lambda path: path.suffix)
  places = {int(path.stem): path for path in found}
  return {step: places[step] for step in sorted(places)}


def _step_of(path: Path) -> int | None:
  name = path.name.removesuffix(_ASIDE)
  return int(name) if name.isdecimal() and path.is_dir() else None


def _hint(folder: Path) -> str:
  """Where checkpoints are, if not in this folder: around it, or up to two levels below."""
  if folder.name.isdecimal() and (folder / "state").is_dir():
    return f"; it is a checkpoint itself, open {folder.parent}"
  near = {
    path.parent.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/state")
  }
  found = [f"{path} (steps {list(_places(path))})" for path in sorted(near) if _places(path)]
  return f"; there are checkpoints in {', '.join(found)}" if found else ""
