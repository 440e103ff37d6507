"""Identifies a run: its settings, code, versions and device, and run.json, which stores them."""

import ast
import dataclasses
import datetime
import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from distill_jax.distributed.platform import instruction_set
from distill_jax.jobs.config import Config, ConfigError
from distill_jax.jobs.plan import is_complete
from distill_jax.storage import files, sealed_json
from distill_jax.version import __version__

RUN_FILE = "run.json"
Identity = dict[str, Any]

_COMPARED = ("config", "settings", "code")
_STORED = (*_COMPARED, "command", "device")
_MACHINE_SETTINGS = ("cache", "cache_batch_size", "devices", "mesh")
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "tensorflow-datasets",
  "grain",
)


def identify(
  config: Config, path: Path, overrides: Sequence[str], arguments: Sequence[str]
) -> Identity:
  """Returns what identifies a run and can reproduce it, as values that json can hold.

  Args:
    config: the config, overrides applied.
    path: the config's file.
    overrides: texts `field=value`.
    arguments: all arguments of the command.
  """
  device = f"{config.devices or jax.device_count()} x {jax.devices()[0].device_kind}"
  vectors = instruction_set() if jax.default_backend() == "cpu" else ""
  if vectors:
    device += f" ({vectors})"
  if jax.process_count() > 1:
    device += f" of {jax.process_count()} processes"
  return {
    "name": path.stem,
    "command": shlex.join(["python", "-m", "distill_jax", *arguments]),
    "config": str(path),
    "settings": settings_of(config),
    "code": hash_code(path),
    "overrides": list(overrides),
    "versions": _versions(),
    "git": _git_revision(path.resolve().parent),
    "device": device,
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
  }


def settings_of(config: Any) -> dict[str, Any]:
  """Returns all fields as json can hold them: nested dataclasses as dicts, tuples as lists."""
  return _jsonable(dataclasses.asdict(config))


def hash_code(path: Path) -> str:
  """Hashes the code of a config and of the files next to it that it imports.

  Comments, layout and docstrings may change; anything else makes another run.
  """
  code: dict[str, str] = {}
  waiting = [path]
  while waiting:
    file = waiting.pop()
    if file.name in code or not file.is_file():
      continue
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
      _drop_docstring(node)
      waiting += [path.parent / f"{name}.py" for name in _imported_names(node)]
    code[file.name] = ast.dump(tree)
  text = "".join(code[name] for name in sorted(code))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_run_file(
  folder: Path, identity: Mapping[str, Any], config_class: type[Config], *, report_only: bool
) -> None:
  """Writes run.json, unless the folder holds another run.

  Args:
    folder: the run's folder, created if it does not exist.
    identity: from `identify`.
    config_class: class whose defaults stand for fields that an older version did not have.
    report_only: keep the command that trained what is reported.

  Raises:
    ConfigError: the folder holds a run with other settings, which are listed, or a corrupt
      run.json, or cannot be written.
  """
  path = folder / RUN_FILE
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
      stored = _read_run_file(path)
      _check_same_run(folder, stored, identity, settings_of(config_class()))
      if report_only:
        identity = {**identity, "command": stored["command"]}
      elif stored["device"] != identity["device"]:
        print(
          f"resuming on {identity['device']} a run started on {stored['device']}: results may "
          "differ in the last bits",
          flush=True,
        )
    files.write(path, sealed_json.dumps(identity, indent=2) + "\n")
  except OSError as error:
    raise ConfigError(f"--workdir: {folder} cannot be written: {error}") from error


def explain_teacher(folder: Path, settings: Mapping[str, Any]) -> None:
  """Says in which settings the run of a teacher that was trained elsewhere differs from this one.

  Args:
    folder: the teacher's, in that of its run.
    settings: those of this run.
  """
  path = folder.parent / RUN_FILE
  if not path.exists():
    print(f"teacher: {folder}, of unknown settings: there is no {path}", flush=True)
    return
  lines = differences(_read_run_file(path)["settings"], settings)
  other = ", whose run has other settings:" if lines else ""
  print("\n  ".join([f"teacher: {folder}{other}", *lines]), flush=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Returns a line `field: old -> new` for each field in which two nested settings differ."""
  lines = []
  for name in sorted({*old, *new}):
    old_value = old.get(name)
    new_value = new.get(name)
    if isinstance(old_value, dict) and isinstance(new_value, dict):
      lines += differences(old_value, new_value, f"{prefix}{name}.")
    elif old_value != new_value:
      lines.append(f"{prefix}{name}: {old_value!r} -> {new_value!r}")
  return lines


def _jsonable(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _jsonable(item) for name, item in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _drop_docstring(node: ast.AST) -> None:
  if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
    return
  if ast.get_docstring(node) is not None:
    node.body = node.body[1:]


def _imported_names(node: ast.AST) -> list[str]:
  """Returns the top-level names of the modules that a statement imports."""
  names = []
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  elif isinstance(node, ast.ImportFrom):
    names = [node.module or ""]
  return [name.partition(".")[0] for name in names]


def _versions() -> dict[str, str]:
  """Returns the versions of Python, of this package and of the installed ones of `_PACKAGES`."""
  versions = {"python": platform.python_version(), "distill_jax": __version__}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


def _git_revision(folder: Path) -> str | None:
  """Returns the commit of the folder's repository; None without git or outside a repository."""

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    changed = " with uncommitted changes" if git("status", "--porcelain") else ""
    return git("rev-parse", "HEAD") + changed
  except (OSError, subprocess.CalledProcessError):
    return None


def _read_run_file(path: Path) -> Identity:
  try:
    return sealed_json.read(path, *_STORED)
  except ValueError as error:
    raise ConfigError(
      f"--workdir: {error}: delete it, and the same command writes it again"
    ) from error


def _check_same_run(
  folder: Path, stored: Identity, identity: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
  old = {name: stored[name] for name in _COMPARED}
  old["settings"] = _with_defaults(old["settings"], defaults)
  new = {name: identity[name] for name in _COMPARED}
  for run in (old, new):
    run["settings"] = {
      name: value for name, value in run["settings"].items() if name not in _MACHINE_SETTINGS
    }
  lines = [line.removeprefix("settings.") for line in differences(old, new)]
  if lines:
    raise ConfigError(
      f"--workdir: expected an empty folder or one of this run, got {folder}, which holds a run "
      "with other settings: choose another folder, or give its settings (its -> given):\n  "
      + "\n  ".join(lines)
      + (
        f"\nits teacher can teach in another folder: --teacher={folder / 'teacher'}"
        if is_complete(folder / "teacher")
        else ""
      )
    )


def _with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of an older version, completed by fields that were added since."""
  completed = {**defaults, **settings}
  for name, value in settings.items():
    default = defaults.get(name)
    if isinstance(value, dict) and isinstance(default, dict):
      completed[name] = _with_defaults(value, default)
  return completed
