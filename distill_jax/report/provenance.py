"""Builds the sections on the run itself: what was run, and the command that repeats it."""

from collections.abc import Mapping
from typing import Any

from distill_jax.report.document import Block, Code, Heading, Table, Text

_FACTS = {
  "name": "Run",
  "date": "Date",
  "config": "Config",
  "git": "Git revision",
  "device": "Device",
}


def provenance(run: Mapping[str, Any]) -> list[Block]:
  """Returns the sections on the run itself; facts that `run` does not have are left out."""
  blocks: list[Block] = [Heading("What was run")]
  facts = [[title, _text(run[key])] for key, title in _FACTS.items() if run.get(key)]
  facts += [[f"Data: {name}", value] for name, value in _flat(run.get("data"))]
  facts += [
    [f"Seconds: {stage}", f"{seconds:.1f}"] for stage, seconds in run.get("seconds", {}).items()
  ]
  facts += [[f"Stopped: {name}", reason] for name, reason in run.get("stopped", {}).items()]
  facts += [[f"Version: {package}", value] for package, value in _flat(run.get("versions"))]
  if facts:
    blocks.append(Table(["", ""], facts, numeric=False))
  if run.get("command"):
    overrides = [
      f"{name}={value}" if name else value for name, value in _flat(run.get("overrides"))
    ]
    text = "No field was overridden."
    if overrides:
      text = f"Overrides of the config: {', '.join(overrides)}."
    blocks += [Heading("Run it again"), Text(text), Code(_text(run["command"]))]
  settings = _flat(run.get("settings"))
  if settings:
    blocks += [Heading("Settings"), Table(["Field", "Value"], settings, numeric=False)]
  return blocks


def _flat(value: Any, path: str = "") -> list[list[str]]:
  """Returns nested mappings as `[["optimizer.rate", "0.1"], ...]`, lists as rows without a name."""
  if isinstance(value, Mapping):
    return [
      row
      for key, item in value.items()
      for row in _flat(item, f"{path}.{key}" if path else str(key))
    ]
  if isinstance(value, list | tuple) and not path:
    return [["", _text(item)] for item in value]
  return [] if value is None and not path else [[path, _text(value)]]


def _text(value: Any) -> str:
  if isinstance(value, list | tuple):
    return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
  return str(value)
