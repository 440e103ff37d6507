"""Shows a training on the screen: a progress bar on a terminal, and lines that stay."""

import contextlib
import statistics
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from distill_jax.distributed.progress import writing_above
from distill_jax.train.learning_rate import NAME as LEARNING_RATE

# The bar comes last: a narrow terminal leaves it out, and not the metrics.
_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}] {bar}"
_SPEED = "examples_per_second"


class Screen:
  """A bar with the metrics of the last report, on a terminal; a line for each evaluation.

  Attributes:
    title: the training's name.
  """

  def __init__(self, title: str, start: int, steps: int, *, main: str, progress: bool):
    """Shows the bar.

    Args:
      title: title of the bar, and of each line.
      start, steps: step from which the run resumes, and number of steps in all.
      main: name of the score that is shown next to the loss.
      progress: whether to show anything.
    """
    self.title, self._steps, self._progress = title, steps, progress
    self._names = tuple(dict.fromkeys(("loss", main)))
    self._metrics: dict[str, float] = {}
    self._step = start
    self._speeds: list[tuple[int, float]] = []
    self._terminal = progress and sys.stderr.isatty()
    self._bar = tqdm(
      total=steps,
      initial=start,
      desc=title,
      bar_format=_FORMAT,
      dynamic_ncols=True,
      disable=not self._terminal,
      leave=False,
    )
    self._stack = contextlib.ExitStack()
    self._stack.enter_context(writing_above(self._bar))

  def train(self, step: int, values: Mapping[str, float]) -> None:
    """Moves the bar, and shows the metrics that fit into its line."""
    self._metrics = dict(values)
    if _SPEED in values:
      self._speeds.append((step - self._step, values[_SPEED]))
    self._step = step
    if self._terminal:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix_str(_join(self._texts(values), self._room()))

  def validation(self, step: int, values: Mapping[str, float]) -> None:
    """Prints the scores; below each other, since a terminal shows the training's in the bar."""
    texts = self._scores(values, "val ")
    if not self._terminal:
      texts = self._texts(self._metrics | self._speed()) + texts
    self.print(f"{self.title} {step}/{self._steps}  {_join(texts)}")

  def print(self, line: str) -> None:
    """Prints a line, on a terminal above the bar."""
    if self._progress:
      print(line, flush=True)

  def close(self) -> None:
    """Removes the bar."""
    self._stack.close()
    self._bar.close()

  def _speed(self) -> dict[str, float]:
    """Returns the speed of the steps since the last line."""
    if not self._speeds:
      return {}
    steps, speeds = zip(*self._speeds)
    self._speeds = []
    return {_SPEED: statistics.harmonic_mean(speeds, weights=steps)}

  def _texts(self, values: Mapping[str, float]) -> list[str]:
    """Returns what a training reports, the most important first."""
    texts = self._scores(values)
    if LEARNING_RATE in values:
      texts.append(f"lr {values[LEARNING_RATE]:.3g}")
    if _SPEED in values:
      texts.append(f"{values[_SPEED]:,.0f} examples/s")
    return texts

  def _scores(self, values: Mapping[str, float], prefix: str = "") -> list[str]:
    return [f"{prefix}{name} {values[name]:.4g}" for name in self._names if name in values]

  def _room(self) -> int:
    """Returns the number of columns for metrics."""
    shown = self._bar.format_dict
    columns, elapsed = shown["ncols"] or 80, tqdm.format_interval(shown["elapsed"])
    rest = f"{self.title}: {self._steps}/{self._steps} [{elapsed}<{elapsed}, ] #"
    return columns - len(rest)


def _join(texts: Sequence[str], room: int | None = None) -> str:
  """Returns the first texts that fit into `room` columns: half a number would be a wrong one."""
  joined = ""
  for text in texts:
    longer = f"{joined}  {text}" if joined else text
    if room is not None and len(longer) > room:
      break
    joined = longer
  return joined
