"""Sums metrics over the steps since the last report, also over those before a run was stopped."""

from collections.abc import Mapping
from typing import Any

from distill_jax.train.log import Packed, fetch

_NOTE = "window"


class Window:
  """The metrics of the steps since the last report; they stay on the device until they are read."""

  def __init__(self, notes: Mapping[str, Any]):
    """Takes from `notes` the sums of an earlier part of the run, stopped within this window."""
    self._sums: Mapping[str, Any] = notes.get(_NOTE, {})
    self._steps: list[Packed] = []

  def add(self, metrics: Packed) -> None:
    """Adds the metrics of a step."""
    self._steps.append(metrics)

  def take(self) -> dict[str, Any]:
    """Returns (sum, count) pairs by name, and begins the next window."""
    sums = self._read()
    self._sums = {}
    self._steps = []
    return sums

  def notes(self) -> dict[str, Any]:
    """Returns what a later part of the run needs, JSON values."""
    return {_NOTE: {name: [float(x) for x in pair] for name, pair in self._read().items()}}

  def _read(self) -> dict[str, Any]:
    sums = fetch(self._steps)
    for name, (total, count) in self._sums.items():
      new_total, new_count = sums.get(name, (0.0, 0.0))
      sums[name] = (total + new_total, count + new_count)
    return sums
