"""Lists the checkpoints of a folder, decides which stay, and replaces and removes them atomically.

Each step has a directory of its name. While a step is written again, the old directory is
`STEP.replaced`; it counts until the new one is complete. A directory is renamed to
`STEP-TOKEN.removed` before its files are deleted.
"""

import contextlib
import math
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distill_jax.storage import seal, serialization

_REPLACED, _REMOVED = ".replaced", ".removed"

Best = tuple[str, str]
"""The metric that decides which checkpoint is the best, and 'max' or 'min'."""

LOSSES = ("nll", "loss")
"""Scores that break ties, the first one that there is."""


def read_seals(folder: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
  """Returns `(step, seal)` of the valid checkpoints, and `(step, reason)` of the corrupt ones."""
  seals = []
  corrupt = []
  for step, path in step_folders(folder).items():
    try:
      seals.append((step, serialization.load_seal(path, step)))
    except seal.CorruptFile as error:
      corrupt.append((step, str(error)))
  return seals, corrupt


def rank_steps(seals: Mapping[int, Mapping[str, Any]], best: Best | None) -> list[int]:
  """Returns the steps with a finite value of the metric, best first."""
  if best is None:
    return []
  keys = {step: score_key(body["metrics"], best) for step, body in seals.items()}
  ranked = sorted((key, step) for step, key in keys.items() if key is not None)
  return [step for _, step in reversed(ranked)]


def score_key(scores: Mapping[str, float], best: Best) -> tuple[float, float] | None:
  """Returns what orders evaluations, the best one last; None where the score is not finite.

  A small validation set has many equal accuracies: of those the lower loss is better, and of equal
  losses the later evaluation.
  """
  name, mode = best
  score = scores.get(name, math.nan)
  if not math.isfinite(score):
    return None
  loss = next((scores[loss] for loss in LOSSES if loss in scores), math.inf)
  return score if mode == "max" else -score, -loss if math.isfinite(loss) else -math.inf


def retained_steps(
  seals: Mapping[int, Mapping[str, Any]], keep: int, best: Best | None
) -> set[int]:
  """Returns the latest `keep` steps and the best one."""
  return {*sorted(seals)[-keep:], *rank_steps(seals, best)[:1]}


def step_folders(folder: Path) -> dict[int, Path]:
  """Returns the directory of each step, in order; the old one while a step is being replaced."""
  paths = [path for path in folder.iterdir() if _step_of(path) is not None]
  # A path with the suffix sorts after the one without, and so takes its place in the dict.
  paths.sort(key=lambda path: path.suffix)
  folders = {int(path.stem): path for path in paths}
  return {step: folders[step] for step in sorted(folders)}


def move_aside(folder: Path, step: int) -> None:
  """Moves the directory of a step, if there is one, aside until `drop_replaced`."""
  with contextlib.suppress(FileNotFoundError):
    (folder / str(step)).rename(_replaced_path(folder, step))


def drop_replaced(folder: Path, step: int) -> None:
  """Removes what `move_aside` moved."""
  remove(_replaced_path(folder, step))


def restore_replaced(folder: Path) -> None:
  """Moves back all that was moved aside for a replacement that was not completed."""
  for path in folder.glob(f"*{_REPLACED}"):
    remove(path.with_suffix(""))
    path.rename(path.with_suffix(""))


def remove_other_steps(folder: Path, steps: Collection[int]) -> None:
  """Removes all checkpoints but `steps`, and what earlier removals left."""
  for path in folder.glob(f"*{_REMOVED}"):
    _try_to_delete(path)
  names = {str(step) for step in steps}
  others = [
    path for path in folder.iterdir() if _step_of(path) is not None and path.name not in names
  ]
  for path in others:
    # Best effort: the next save tries again.
    with contextlib.suppress(OSError):
      remove(path)


def remove(path: Path) -> None:
  """Removes a directory if it exists; readers see either all of it or nothing."""
  garbage = path.with_name(f"{path.name}-{uuid.uuid4().hex}{_REMOVED}")
  with contextlib.suppress(FileNotFoundError):
    path.rename(garbage)
    _try_to_delete(garbage)


def hint_at_checkpoints(folder: Path) -> str:
  """Returns the end of an error message: where checkpoints are, up to two levels below."""
  if folder.name.isdecimal() and serialization.is_checkpoint(folder):
    return f"; it is a checkpoint itself: open {folder.parent}"
  parents = {
    path.parent
    for depth in ("*", "*/*", "*/*/*")
    for path in folder.glob(depth)
    if serialization.is_checkpoint(path)
  }
  steps = {path: list(step_folders(path)) for path in sorted(parents)}
  places = [f"{path} (steps {found})" for path, found in steps.items() if found]
  return f"; there are checkpoints in {', '.join(places)}" if places else ""


def _step_of(path: Path) -> int | None:
  name = path.name.removesuffix(_REPLACED)
  return int(name) if name.isdecimal() and path.is_dir() else None


def _replaced_path(folder: Path, step: int) -> Path:
  return folder / f"{step}{_REPLACED}"


def _try_to_delete(path: Path) -> None:
  # `ignore_errors` lets errors of closing a file through.
  with contextlib.suppress(OSError):
    shutil.rmtree(path, ignore_errors=True)
