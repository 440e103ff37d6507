"""Reads finished runs from their folders; finds those that differ in one field."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.report.entries import Entry, Group, groups
from distill_jax.report.stored import from_json
from distill_jax.storage import sealed_json
from distill_jax.types import Metric


class Run(NamedTuple):
  """A finished run.

  Attributes:
    facts: what was run, as passed to `report.write`.
    metrics: the task's metrics that some entry has.
    entries: the networks with their scores.
  """

  facts: Mapping[str, Any]
  metrics: Sequence[Metric]
  entries: Sequence[Entry]

  @property
  def name(self) -> str:
    """Returns the name of the run's config."""
    return self.facts.get("name") or "run"

  @property
  def metric(self) -> Metric:
    """Returns the metric that heads the run's report."""
    return self.metrics[0]

  @property
  def data(self) -> tuple[str, int | None]:
    """Returns name and number of examples of the test split."""
    data = self.facts.get("data") or {}
    return data.get("name") or "unknown data", data.get("test")

  @property
  def comparable(self) -> tuple[tuple[str, int | None], Metric]:
    """Returns test split and first metric: only runs that agree in these can be compared."""
    return self.data, self.metric

  @property
  def groups(self) -> list[Group]:
    """Returns the groups of the run's networks."""
    return groups(self.entries)


class Series(NamedTuple):
  """Runs of one config that differ in the value of one numeric field, ordered by that value."""

  field: str
  values: Sequence[float]
  runs: Sequence[Run]


def read(folder: Path) -> Run:
  """Returns the run of a folder, from its run.json and report/results.json.

  Raises:
    ValueError: the folder has no run, or no readable report; the message has the command that
      writes it.
  """
  identity = _object(
    folder / "run.json",
    _no_run(folder),
    "delete it, and the command of the run writes it again",
  )
  command = identity.get("command", "python -m distill_jax --config=CONFIG")
  write_it = f"write it with\n  {command} --stages=report"
  path = folder / "report" / "results.json"
  content = _object(path, f"{folder}: expected a report, got none: {write_it}", write_it)
  try:
    run = Run(content["run"], *from_json(content))
    if not run.groups:
      raise ValueError("it has no entries")
    return run
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} was not written by this version ({error!r}): {write_it}") from error


def series(runs: Sequence[Run]) -> list[Series]:
  """Returns all sets of comparable runs of one name whose settings differ in one numeric field."""
  settings = [_leaves(run.facts.get("settings") or {}) for run in runs]
  fields = dict.fromkeys(
    field for leaves in settings for field, value in leaves.items() if _is_number(value)
  )
  result = []
  for field in fields:
    alike = defaultdict(list)
    for run, leaves in zip(runs, settings):
      if _is_number(leaves.get(field)):
        others = {name: value for name, value in leaves.items() if name != field}
        key = run.name, run.comparable, json.dumps(others, sort_keys=True)
        alike[key].append((leaves[field], run))
    for points in alike.values():
      if len({value for value, _ in points}) > 1:
        points.sort(key=lambda point: point[0])
        values, members = map(list, zip(*points))
        result.append(Series(field, values, members))
  return result


def _no_run(folder: Path) -> str:
  """Returns the message for a folder without a run, with the next step."""
  if not folder.is_dir():
    return f"RUN: expected the folder of a finished run, got {folder}, which is no folder"
  start = f"RUN: expected the folder of a finished run, got {folder}, which has no run.json"
  near = [folder.parent, *sorted(child for child in folder.iterdir() if child.is_dir())]
  runs = [str(path) for path in near if (path / "run.json").exists()]
  if runs:
    return f"{start}; did you mean {' '.join(runs)}?"
  return f"{start}: start a run with\n  python -m distill_jax --config=CONFIG --workdir={folder}"


def _object(path: Path, missing: str, hint: str) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(missing)
  try:
    return sealed_json.read(path)
  except ValueError as error:
    raise ValueError(f"{error}: {hint}") from error


def _leaves(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
  """Returns nested settings as {'optimizer.rate': 0.1, ...}."""
  leaves: dict[str, Any] = {}
  for name, value in settings.items():
    field = f"{path}.{name}" if path else name
    leaves |= _leaves(value, field) if isinstance(value, Mapping) else {field: value}
  return leaves


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
