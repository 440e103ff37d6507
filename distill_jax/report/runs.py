"""Finished runs, read back from their folders, and those among them that vary one field."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.report.results import Group, Measured, groups
from distill_jax.report.stored import from_json


class Run(NamedTuple):
  """A finished run: what was run (`facts`, as `report.write` was given them), and the scores."""

  facts: Mapping[str, Any]
  measured: Sequence[Measured]

  @property
  def name(self) -> str:
    return self.facts.get("name") or "run"

  @property
  def data(self) -> tuple[str, int | None]:
    """Name and number of examples of the test split: scores of different ones are not to be compared."""
    data = self.facts.get("data") or {}
    return data.get("name") or "unknown data", data.get("test")

  @property
  def groups(self) -> list[Group]:
    return groups(m.entry for m in self.measured)


class Series(NamedTuple):
  """Runs of one config that differ in the value of one numeric field, by that value."""

  field: str
  values: Sequence[float]
  runs: Sequence[Run]


def read(folder: Path) -> Run:
  """Read run.json and report/results.json.

  Raises:
    ValueError: the folder holds no run, or one without a readable report; says what makes it.
  """
  identity = _object(folder / "run.json", _no_run(folder))
  write_it = f"write it with\n  {identity.get('command', 'python -m distill_jax --config=CONFIG')} --stages=report"
  path = folder / "report" / "results.json"
  content = _object(path, f"{folder} holds no report: {write_it}")
  try:
    run = Run(content["run"], from_json(content))
    if not run.groups:
      raise ValueError("it holds no network")
    return run
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} was not written by this version ({error!r}): {write_it}") from error


def series(runs: Sequence[Run]) -> list[Series]:
  """Every set of two runs or more with one name whose settings are the same but for one numeric field."""
  settings = [_leaves(run.facts.get("settings") or {}) for run in runs]
  fields = dict.fromkeys(
    field for own in settings for field, value in own.items() if _is_number(value)
  )
  found = []
  for field in fields:
    alike = defaultdict(list)
    for run, own in zip(runs, settings):
      if _is_number(own.get(field)):
        rest = json.dumps(
          {name: value for name, value in own.items() if name != field}, sort_keys=True
        )
        alike[run.name, run.data, rest].append((own[field], run))
    for points in alike.values():
      if len({value for value, _ in points}) > 1:
        points.sort(key=lambda point: point[0])
        found.append(Series(field, *map(list, zip(*points))))
  return found


def _no_run(folder: Path) -> str:
  if not folder.is_dir():
    return f"{folder} is no folder: expected one of a finished run, with run.json in it"
  near = [folder.parent, *sorted(child for child in folder.iterdir() if child.is_dir())]
  known = [str(path) for path in near if (path / "run.json").exists()]
  if known:
    return f"{folder} holds no run.json: it is no folder of a run; did you mean {' '.join(known)}?"
  command = f"python -m distill_jax --config=CONFIG --workdir={folder}"
  return f"{folder} holds no run.json: it is no folder of a run; this makes one:\n  {command}"


def _object(path: Path, missing: str) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(missing)
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
  return content


def _leaves(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, value in settings.items():
    place = f"{path}.{name}" if path else name
    found |= _leaves(value, place) if isinstance(value, Mapping) else {place: value}
  return found


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
