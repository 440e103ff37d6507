"""The command line: `python -m distill_jax --config=configs/digits.py [--config.FIELD=VALUE ...]`."""

import argparse
import ast
import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from distill_jax.distributed import hosts
from distill_jax.distributed.compilation import enable_compilation_cache
from distill_jax.distributed.interruption import Interrupted
from distill_jax.errors import suggest
from distill_jax.jobs.checks import check
from distill_jax.jobs.compile_ahead import describe_cost
from distill_jax.jobs.config import Config, ConfigError
from distill_jax.jobs.dry_run import print_plan
from distill_jax.jobs.overrides import differences, load_config, settings_of
from distill_jax.jobs.plan import EXTRA_STAGES, STAGES, Job
from distill_jax.jobs.stages import run_stages
from distill_jax.storage import files
from distill_jax.storage.lease import Lease
from distill_jax.train import NonFiniteError
from distill_jax.train.profile import parse_steps
from distill_jax.version import __version__

_OF_THE_MACHINE = ("cache", "cache_batch_size", "devices", "mesh")
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


def run(argv: Sequence[str] | None = None) -> None:
  """The console script; exits with 2 where the command or the config is at fault, 1 where training failed, 143 where
  SIGTERM stopped it."""
  try:
    main(sys.argv[1:] if argv is None else argv)
  except NonFiniteError as error:
    print(f"distill-jax: {error}", file=sys.stderr)
    hosts.abort(1)
  except Interrupted as stop:
    print(f"distill-jax: {stop}", file=sys.stderr, flush=True)
    raise
  except (ValueError, OSError, ImportError) as error:
    print(f"distill-jax: {error}", file=sys.stderr)
    hosts.abort(2)


def main(argv: Sequence[str]) -> None:
  """Runs a config's stages; the same command again goes on where it was stopped.

  Raises:
    ConfigError: the command or the config cannot be run.
  """
  flags, overrides = _parse(argv)
  _join(flags)
  config = load_config(flags.config, overrides)
  if flags.compile_for:
    print(describe_cost(config, flags.compile_for))
    return
  seeds, traced = _seeds(flags.seeds), _traced(flags.profile_steps)
  chosen = _stages(flags.stages)
  name = Path(flags.config).stem
  folder = Path(flags.workdir or f"runs/{name}").resolve()
  splits = hosts.run_in_turn(config.data)
  identity = _identity(config, name, flags.config, overrides, argv)
  job = Job(config, folder, seeds, splits, identity, traced)
  hosts.assert_equal("run", {name: identity[name] for name in ("settings", "code", "versions")})
  check(job, chosen)
  if flags.dry_run:
    if hosts.is_first():
      print_plan(job)
    return
  defaults = settings_of(type(config)())
  with Lease(folder):
    hosts.run_on_first(
      lambda: _write_run_file(folder, identity, defaults, report_only=chosen == ("report",))
    )
    enable_compilation_cache(folder)
    run_stages(job, chosen)


def _join(flags: argparse.Namespace) -> None:
  """Finds the other processes of the run, if there are any."""
  given = flags.coordinator_address, flags.num_processes, flags.process_id
  if flags.distributed or given != (None, None, None):
    try:
      hosts.join(*given)
    except ValueError as error:
      raise ConfigError(f"--distributed: {error}") from error


def _traced(text: str | None) -> range | None:
  try:
    return None if text is None else parse_steps(text)
  except ValueError as error:
    raise ConfigError(f"--profile_steps: {error}") from error


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  overrides, rest = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument.startswith("--config."):
      name, equals, value = argument.removeprefix("--config.").partition("=")
      overrides.append(f"{name}={value if equals else next(arguments, '')}")
    else:
      rest.append(argument)
  parser = argparse.ArgumentParser(
    "distill-jax",
    description=__doc__,
    allow_abbrev=False,
    epilog="--config.FIELD=VALUE overrides a field",
  )
  parser.add_argument(
    "--config", required=True, help="a Python file whose get_config() returns the job"
  )
  parser.add_argument("--workdir", help="where the run is kept; default: runs/NAME OF THE CONFIG")
  parser.add_argument(
    "--stages",
    default=",".join(STAGES),
    help=f"default: %(default)s; besides: {','.join(EXTRA_STAGES)}",
  )
  parser.add_argument(
    "--seeds", default="0", help="of student and baseline, such as 0,1,2; default: %(default)s"
  )
  parser.add_argument(
    "--dry_run", action="store_true", help="print shapes, sizes and memory; train nothing"
  )
  parser.add_argument(
    "--compile_for",
    metavar="TOPOLOGY",
    help="print what a step costs on v5e:4x4, v5p:8x8x8, ... or cpu; needs no TPU, trains nothing",
  )
  parser.add_argument(
    "--profile_steps",
    metavar="START:STOP",
    help="trace these steps of each training into FOLDER/profile",
  )
  parser.add_argument(
    "--distributed",
    action="store_true",
    help="several processes, the same command on each: jax finds them on TPU pods, under SLURM and Open MPI",
  )
  parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="elsewhere: of process 0")
  parser.add_argument("--num_processes", type=int, metavar="N", help="elsewhere: how many")
  parser.add_argument(
    "--process_id", type=int, metavar="I", help="elsewhere: which one this is, from 0"
  )
  parser.add_argument("--version", action="version", version=__version__)
  return parser.parse_args(rest), overrides


def _seeds(text: str) -> tuple[int, ...]:
  try:
    seeds = tuple(int(part) for part in text.split(","))
  except ValueError:
    raise ConfigError(f"--seeds: expected integers such as 0,1,2, got {text!r}") from None
  if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
    raise ConfigError(f"--seeds: expected different integers from 0 to {2**32 - 1}, got {text!r}")
  return seeds


def _stages(text: str) -> tuple[str, ...]:
  chosen = tuple(part.strip() for part in text.split(","))
  for stage in chosen:
    if stage not in STAGES + EXTRA_STAGES:
      raise ConfigError(
        f"--stages: there is no stage {stage!r}{suggest(stage, STAGES + EXTRA_STAGES)}"
      )
  return chosen


def _identity(config: Config, name: str, path: str, overrides: list[str], argv) -> dict[str, Any]:
  return {
    "name": name,
    "command": shlex.join(["python", "-m", "distill_jax", *argv]),
    "config": path,
    "settings": settings_of(config),
    "code": _code_hash(Path(path)),
    "overrides": overrides,
    "versions": {"python": platform.python_version(), "distill_jax": __version__} | _versions(),
    "git": _git_revision(Path(path).resolve().parent),
    "device": f"{config.devices or jax.device_count()} x {jax.devices()[0].device_kind}"
    + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
    "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
  }


def _code_hash(path: Path) -> str:
  """Of what a config file does, and those beside it that it imports: comments, layout and docstrings may change."""
  code, waiting = {}, [path]
  while waiting:
    file = waiting.pop()
    if file.name in code or not file.is_file():
      continue
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
      if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
      ):
        node.body = node.body[1:]
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      waiting += [path.parent / f"{name.partition('.')[0]}.py" for name in names]
    code[file.name] = ast.dump(tree)
  return hashlib.sha256("".join(code[name] for name in sorted(code)).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
  found = {}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _git_revision(folder: Path) -> str | None:
  def git(*arguments):
    return subprocess.run(
      ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    changed = " with uncommitted changes" if git("status", "--porcelain") else ""
    return git("rev-parse", "HEAD") + changed
  except (OSError, subprocess.CalledProcessError):
    return None


def _read_down(path: Path) -> dict[str, Any]:
  try:
    run = json.loads(path.read_text())
    return {name: run[name] for name in ("config", "settings", "code", "command", "device")}
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"--workdir: {path} is damaged ({error!r}): delete it to write it anew"
    ) from error


def _plain(value: Any) -> Any:
  """Settings without those of the machine: where the cache lies and how it is filled, and the devices."""
  if not isinstance(value, dict):
    return value
  return {name: v for name, v in value.items() if name not in _OF_THE_MACHINE}


def _completed(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
  """Settings of an older version, with what has been added since as it was then: at its default."""
  whole = {name: value for name, value in defaults.items() if name not in old} | old
  return {
    name: _completed(value, defaults[name])
    if isinstance(value, dict) and name in defaults
    else value
    for name, value in whole.items()
  }


def _write_run_file(
  folder: Path, identity: dict[str, Any], defaults: dict[str, Any], *, report_only: bool
) -> None:
  """Writes run.json; a folder that holds another run is refused.

  A report alone is told with the command that trained what it reports.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    if path.exists():
      old = _read_down(path)
      old["settings"] = _completed(old["settings"], defaults)
      compared = ("config", "settings", "code")
      before, now = ({name: _plain(run[name]) for name in compared} for run in (old, identity))
      changed = differences(before, now)
      if changed:
        lines = "\n  ".join(line.removeprefix("settings.") for line in changed)
        raise ConfigError(
          f"--workdir: {folder} holds a run with other settings; choose another folder:\n  {lines}"
        )
      if report_only:
        identity = {**identity, "command": old["command"]}
      elif old.get("device") != identity["device"]:
        print(
          f"goes on with {identity['device']}, began with {old.get('device')}: last bits may differ",
          flush=True,
        )
    files.write(path, json.dumps(identity, indent=2) + "\n")
  except OSError as error:
    raise ConfigError(f"--workdir: {folder} cannot be written: {error}") from error
