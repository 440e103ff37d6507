"""Reports a run: a progress bar or lines, metrics.jsonl, timings.jsonl, TensorBoard files."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.objectives.left_out import is_fraction
from distill_jax.storage import files, sealed_json
from distill_jax.train.clock import Clock
from distill_jax.train.learning_rate import is_learning_rate
from distill_jax.train.options import Callback
from distill_jax.train.screen import Screen

_MANY_EVALUATIONS = 5
"""Fewer may have equal scores by chance."""
_NO_SCORES = ("step", "phase", "sparsity")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """A step's metrics as one array: to fetch a dozen scalars takes longer than a small step."""

  values: jax.Array
  structure: Any


class Log:
  """The history of one training run, in memory, on the screen and (given a folder) on disk.

  Use as a context manager. Lines of `metrics.jsonl` are
  `{"step": 100, "phase": "train" | "validation", "loss": ..., ...}`, and `{"step": 100, "phase":
  "stop", "reason": ...}` where training ended early; those of `timings.jsonl` what `Clock.report`
  returns, one for every start and every report. Each ends with its number and a checksum. Lines
  after the step from which a run resumes are dropped, so that no step is reported twice;
  evaluations that a corrupt line lost are restored from the checkpoints.

  Attributes:
    history: the lines of `metrics.jsonl`.
    clock: measures the steps and what the host waits for.
    screen: shows the reports.
  """

  def __init__(
    self,
    folder: Path | None,
    *,
    start: int,
    steps: int,
    title: str,
    progress: bool,
    main: str = "",
    began: float | None = None,
    evaluations: Mapping[int, Mapping[str, float]] = MappingProxyType({}),
    callbacks: Sequence[Callback] = (),
  ):
    """Opens the files.

    Args:
      folder: where files are written; None: none are.
      start: step from which the run resumes.
      steps: number of steps in all.
      title: title of the progress bar.
      progress: whether to show a progress bar, or lines.
      main: name of the score that is shown next to the loss.
      began: `time.time()` at which this part of the run began; None: now.
      evaluations: scores that are stored with checkpoints, by step.
      callbacks: called with each line; see `RunOptions`.
    """
    self.history: list[dict[str, Any]] = []
    self._files: dict[str, TextIO] = {}
    self._num_lines: dict[str, int] = {}
    self._board, timings = None, []
    if folder is not None:
      self.history = _with_evaluations(_read(folder, "metrics", start), evaluations)
      timings = _read(folder, "timings", start)
      self._open(folder, "metrics", self.history)
      self._open(folder, "timings", timings)
      self._board = _tensorboard(folder / "tensorboard", start)
    self.clock = Clock(timings[-1] if timings else None, began=began)
    self._write("timings", self.clock.report(start))
    self._callbacks = callbacks
    self.screen = Screen(title, start, steps, main=main, progress=progress)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.screen.close()
    for file in self._files.values():
      with contextlib.suppress(OSError):  # `_write` has raised what a full disk kept back.
        file.close()
    if self._board is not None:
      self._board.close()

  def train(self, step: int, metrics: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """Reports means of (sum, count) pairs, and times, of the steps since the last report."""
    timings = self.clock.report(step)
    _warn_of_no_values(metrics)
    with self.clock.waiting("report"):
      values = {name: float(total / count) for name, (total, count) in metrics.items() if count > 0}
      if "step_ms" in timings:
        values["examples_per_second"] = 1e3 * batch_size / timings["step_ms"]["mean"]
      if not any(line["phase"] == "train" for line in self.history):
        _warn_of_left_out(values)
      self.screen.train(step, values)
      self._add(step, "train", values)
      self._write("timings", timings)
      self._show("time", step, _flat(timings))
    return values

  def stop(self, step: int) -> None:
    """Writes the times of the steps since the last report, whose means the next part reports."""
    self._write("timings", self.clock.report(step))

  def stopped(self, step: int, reason: str) -> None:
    """Reports why training ended early; of a run that was called again, once."""
    self.screen.print(f"{self.screen.title}: stopped after step {step}: {reason}")
    line = {"step": step, "phase": "stop", "reason": reason}
    if self.history[-1:] != [line]:
      self.history.append(line)
      self._write("metrics", line)

  def validation(self, step: int, values: Mapping[str, float]) -> None:
    """Reports an evaluation."""
    with self.clock.waiting("report"):
      self._add(step, "validation", values)
      self.screen.validation(step, values)

  def warn_of_constant(self, name: str) -> None:
    """Warns where many evaluations had one and the same score, which then chose no weights."""
    lines = [line for line in self.history if line["phase"] == "validation"]
    if len(lines) < _MANY_EVALUATIONS or len({line.get(name) for line in lines}) > 1:
      return
    values = {other: {line.get(other) for line in lines} for other in lines[0]}
    others = [other for other in values if len(values[other]) > 1 and other not in _NO_SCORES]
    hint = "look at the learning rate and at the labels: no score changed"
    if others:
      hint = f"pass best={others[0]!r}, which changed, or look at the labels"
    warnings.warn(
      f"best: expected {name!r} to change between evaluations, got {lines[0].get(name)} in all "
      f"{len(lines)}, so that the lower loss chose the weights, then the later step: {hint}",
      stacklevel=2,
    )

  def _add(self, step: int, phase: str, values: Mapping[str, float]) -> None:
    line = {"step": step, "phase": phase, **values}
    self.history.append(line)
    self._write("metrics", line)
    self._show(phase, step, values)
    for callback in self._callbacks:
      callback(step, {f"{phase}/{name}": value for name, value in values.items()})

  def _open(self, folder: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the lines of earlier parts of the run, and opens the file for more."""
    path = folder / f"{name}.jsonl"
    files.write(path, sealed_json.dump_lines(lines))
    self._files[name] = path.open("a")
    self._num_lines[name] = len(lines)

  def _write(self, name: str, line: Mapping[str, Any]) -> None:
    if name in self._files:
      self._num_lines[name] += 1
      with files.naming(self._files[name].name):
        self._files[name].write(sealed_json.dump_lines([line], self._num_lines[name]))
        self._files[name].flush()

  def _show(self, group: str, step: int, values: Mapping[str, float]) -> None:
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(f"{group}/{name}", value, step)


def pack(metrics: Mapping[str, Any]) -> Packed:
  """Scalars as one array, under jit."""
  leaves, structure = jax.tree.flatten(metrics)
  dtype = reduce.common_dtype(*leaves)
  return Packed(jnp.stack([x.astype(dtype) for x in leaves]), structure)


def fetch(pending: list[Packed]) -> dict[str, Any]:
  """The sum of several steps' metrics, on the host, in float64: one transfer."""
  rows = np.stack(jax.device_get([packed.values for packed in pending]))
  return jax.tree.unflatten(pending[0].structure, rows.sum(0, dtype=np.float64))


def _warn_of_no_values(sums: Mapping[str, Any]) -> None:
  """Warns where no term had a value in any of the steps: nothing was trained."""
  others = ("loss", "grad_norm", "nonfinite", "empty")
  counts = {name: count for name, (_, count) in sums.items() if not is_learning_rate(name)}
  names = [name for name in counts if name not in others and not is_fraction(name)]
  terms = {name: counts[name] for name in names}
  skipped, _ = sums.get("nonfinite", (0, 0))
  if terms and not skipped and not any(terms.values()):
    warnings.warn(
      f"source: expected labels, or others that give {' or '.join(terms)} a value, got none in "
      "these batches, which trained nothing: look at the labels and at the masks",
      stacklevel=2,
    )


def _warn_of_left_out(values: Mapping[str, float]) -> None:
  """Warns of the rows that a term leaves out, such as transcripts longer than their frames."""
  left_out = {name: x for name, x in values.items() if is_fraction(name) and x > 0}
  if left_out:
    text = ", ".join(f"{100 * x:.3g} % ({name})" for name, x in left_out.items())
    warnings.warn(
      f"source: expected rows that all count, got some that a term leaves out: {text}; look at "
      "their transcripts and numbers of frames, or remove them; the log has these metrics",
      stacklevel=2,
    )


def _flat(timings: Mapping[str, Any]) -> dict[str, float]:
  """What TensorBoard shows of `Clock.report`: 'goodput', 'step_ms_p50', 'waited_data',
  'memory_peak' ...
  """
  groups = ("step_ms", "waited", "memory")
  nested = {f"{group}_{k}": v for group in groups for k, v in timings.get(group, {}).items()}
  return {"goodput": timings["goodput"], **nested}


def _tensorboard(folder: Path, start: int):
  from tensorboardX import SummaryWriter

  return SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)


def _read(folder: Path, name: str, start: int) -> list[dict[str, Any]]:
  """Returns the lines of a file up to the step from which a run resumes."""
  path = folder / f"{name}.jsonl"
  lines = sealed_json.read_lines(path) if path.exists() else []
  return [line for line in lines if line["step"] <= start]


def _with_evaluations(
  lines: list[dict[str, Any]], evaluations: Mapping[int, Mapping[str, float]]
) -> list[dict[str, Any]]:
  """Returns the lines in order, with those of the evaluations that they lack."""
  steps = {line["step"] for line in lines if line["phase"] == "validation"}
  missing = [
    {"step": step, "phase": "validation", **scores}
    for step, scores in evaluations.items()
    if step not in steps
  ]
  return sorted(lines + missing, key=lambda line: (line["step"], line["phase"] == "stop"))
