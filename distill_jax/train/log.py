"""What a run tells while it goes: a progress bar or lines, metrics.jsonl, TensorBoard files."""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from distill_jax import files


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class Packed:
  """A step's metrics as one array: to fetch a dozen scalars takes longer than a small step."""

  values: jax.Array
  structure: Any  # of the metrics' tree


class Log:
  """The history of one training run, in memory, on the screen and (given a folder) on disk.

  Use as a context manager. Lines of `metrics.jsonl` are
  `{"step": 100, "phase": "train" | "validation", "loss": ..., ...}`; what was written after the step that a run
  resumes from is dropped, so that no step is told twice.
  """

  def __init__(self, folder: Path | None, *, start: int, steps: int, title: str, progress: bool):
    self.history: list[dict[str, Any]] = []
    self._file = self._board = None
    if folder is not None:
      path = folder / "metrics.jsonl"
      self.history = _read(path, up_to=start)
      files.write(path, "".join(json.dumps(line) + "\n" for line in self.history))
      self._file = path.open("a")
      self._board = _tensorboard(folder / "tensorboard", start)
    self._progress, self._title, self._steps = progress, title, steps
    terminal = progress and sys.stderr.isatty()
    self._bar = tqdm(total=steps, initial=start, desc=title, unit="step", disable=not terminal, leave=False)
    self._terminal, self._last, self._time = terminal, start, time.perf_counter()
    self._shown: dict[str, float] = {}

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._bar.close()
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()

  def train(self, step: int, metrics: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """Reports means of (sum, count) pairs over the steps since the last report."""
    now = time.perf_counter()
    values = {name: float(total / count) for name, (total, count) in metrics.items() if count > 0}
    values["examples_per_second"] = (step - self._last) * batch_size / max(now - self._time, 1e-9)
    self._bar.update(step - self._last)
    self._last, self._time = step, now
    self._add(step, "train", values)
    return values

  def validation(self, step: int, values: Mapping[str, float]) -> None:
    """Reports an evaluation; where there is no terminal it is a line."""
    self._add(step, "validation", values)
    if self._progress and not self._terminal:
      print(f"{self._title} {step}/{self._steps}  {_text(self._shown)}  {_text(values, 'val ')}", flush=True)
    self._time = time.perf_counter()  # evaluation is not training time

  def _add(self, step: int, phase: str, values: Mapping[str, float]) -> None:
    line = {"step": step, "phase": phase, **values}
    self.history.append(line)
    if phase == "train":
      self._shown = dict(values)
      self._bar.set_postfix_str(_text(values))
    if self._file is not None:
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(f"{phase}/{name}", value, step)


def pack(metrics: Mapping[str, Any]) -> Packed:
  """Scalars as one array, under jit."""
  leaves, structure = jax.tree.flatten(metrics)
  return Packed(jnp.stack(leaves), structure)


def fetch(pending: list[Packed]) -> dict[str, Any]:
  """The sum of several steps' metrics, on the host, in float64: one transfer."""
  rows = np.stack(jax.device_get([packed.values for packed in pending]))
  return jax.tree.unflatten(pending[0].structure, rows.sum(0, dtype=np.float64))


def _text(values: Mapping[str, float], prefix: str = "") -> str:
  named = [f"{prefix}{k} {values[k]:.4g}" for k in ("loss", "nll", "accuracy") if k in values]
  if "examples_per_second" in values:
    named.append(f"{values['examples_per_second']:,.0f} examples/s")
  return "  ".join(named)


def _tensorboard(folder: Path, start: int):
  from tensorboardX import SummaryWriter

  return SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)


def _read(path: Path, *, up_to: int) -> list[dict[str, Any]]:
  if not path.exists() or not up_to:
    return []
  lines = []
  for text in path.read_text().splitlines():
    try:
      line = json.loads(text)
    except json.JSONDecodeError:  # the run was killed while it wrote this line
      break
    if line["step"] <= up_to:
      lines.append(line)
  return lines
