"""Converts the numbers of a report to the plain values of results.json, and back."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report.document import Numbers
from distill_jax.report.entries import Entry, Spread, gain, groups, over_seeds, students
from distill_jax.types import Metric


def as_json(
  entries: Sequence[Entry],
  metrics: Sequence[Metric],
  run: Mapping[str, Any],
  numbers: Sequence[Numbers] = (),
) -> dict[str, Any]:
  """Returns all numbers of the report; those that are not finite become None.

  Args:
    entries: the networks.
    metrics: the task's metrics that some entry has.
    run: what was run.
    numbers: further values, by the task's `figures`.

  Raises:
    ValueError: one of `numbers` has the name of a part of the file.
  """
  names = sorted({name for entry in entries for name in entry.values})
  content = {
    "run": run,
    "metrics": [dataclasses.asdict(metric) for metric in metrics],
    "entries": [_entry(entry, metrics[0].name) for entry in entries],
    "over_seeds": {
      group.name: _present({name: over_seeds(entries, group, name) for name in names})
      for group in groups(entries)
    },
    "distilled_minus_baseline": {
      group.name: _present({name: gain(entries, group, name) for name in names})
      for group in students(entries)
    },
  }
  for block in numbers:
    if block.name in content:
      raise ValueError(f"numbers: {block.name!r} is a part of results.json: rename the block")
    content[block.name] = block.values
  return _plain(content)


def from_json(content: Mapping[str, Any]) -> tuple[list[Metric], list[Entry]]:
  """Returns metrics and entries; these have scores and costs in `scores`, and `leave_out`.

  Raises:
    KeyError, TypeError, AttributeError: `content` is not that of a results.json.
  """
  metrics = [Metric(**fields) for fields in content["metrics"]]
  entries = []
  for row in content["entries"]:
    scores = {name: value for name, value in row["scores"].items() if value is not None}
    leave_out = {name: np.array(parts, float) for name, parts in row["leave_out"].items()}
    entry = Entry(row["role"], row["seed"], scores, {}, [], row["variant"], leave_out=leave_out)
    entries.append(entry)
  return metrics, entries


def _entry(entry: Entry, first: str) -> dict[str, Any]:
  """Returns an entry's numbers; scores without parts of the examples of the first metric only."""
  return {
    "role": entry.role,
    "variant": entry.variant,
    "seed": entry.seed,
    "scores": entry.values,
    "leave_out": {name: parts for name, parts in entry.leave_out.items() if name == first},
  }


def _present(values: Mapping[str, Spread | None]) -> dict[str, Spread]:
  return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
  """Returns what JSON can store: None for NaN and infinity, the text of unknown objects."""
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
