"""results.json: all numbers of a report as plain values, and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report.classes import ClassScores
from distill_jax.report.results import Entry, Measured, Spread, gain, groups, over_seeds, students


def as_json(
  measured: Sequence[Measured], classes: Sequence[ClassScores], run: Mapping[str, Any]
) -> dict:
  """All numbers of the report; one that is not finite becomes None."""
  names = sorted({name for m in measured for name in m.scores})
  spreads = {
    group.name: _known({name: over_seeds(measured, group, name) for name in names})
    for group in groups(m.entry for m in measured)
  }
  gains = {
    group.name: _known({name: gain(measured, group, name) for name in names})
    for group in students(measured)
  }
  rows = [
    {"role": m.entry.role, "variant": m.entry.variant, "seed": m.entry.seed, "scores": m.scores}
    for m in measured
  ]
  return _plain(
    {
      "run": run,
      "entries": rows,
      "over_seeds": spreads,
      "distilled_minus_alone": gains,
      "classes": [_class_as_json(scores) for scores in classes],
    }
  )


def from_json(content: Mapping[str, Any]) -> list[Measured]:
  """The scores of each network, without its logits, history and counts.

  Raises:
    KeyError, TypeError, AttributeError: `content` is no results.json.
  """
  nothing = np.empty((0, 0), np.float32)
  return [
    Measured(
      Entry(row["role"], row["seed"], nothing, {}, [], row.get("variant", "")),
      {name: value for name, value in row["scores"].items() if value is not None},
      {},
    )
    for row in content["entries"]
  ]


def _class_as_json(scores: ClassScores) -> dict:
  return {
    "name": scores.name,
    "examples": scores.examples,
    "accuracy": {group.name: value for group, value in scores.accuracy.items()},
    "gain": {group.name: value for group, value in scores.gain.items()},
  }


def _known(values: Mapping[str, Spread | None]) -> dict[str, Spread]:
  return {name: value for name, value in values.items() if value is not None}


def _plain(value):
  """What JSON can hold: NaN and infinity are not JSON, unknown objects become their text."""
  match value:
    case Spread():
      return _plain(value._asdict())
    case Mapping():
      return {str(key): _plain(item) for key, item in value.items()}
    case np.generic():
      return _plain(value.item())
    case bool() | int() | str() | None:
      return value
    case float():
      return value if math.isfinite(value) else None
    case list() | tuple() | np.ndarray():
      return [_plain(item) for item in value]
  return str(value)
