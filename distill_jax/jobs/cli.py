"""Runs the stages of a config: `python -m distill_jax --config=configs/digits.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from distill_jax.distributed import equality, hosts
from distill_jax.distributed.compilation import enable_compilation_cache
from distill_jax.distributed.interruption import Interrupted, saying_why
from distill_jax.distributed.lost_process import LOST_PROCESS_CODE, is_lost_process
from distill_jax.jobs import data, identity
from distill_jax.jobs.checks import check
from distill_jax.jobs.compile_ahead import describe_cost
from distill_jax.jobs.config import ConfigError, Splits
from distill_jax.jobs.dry_run import print_plan
from distill_jax.jobs.epochs import with_steps
from distill_jax.jobs.flags import parse_arguments
from distill_jax.jobs.overrides import config_file, load_config
from distill_jax.jobs.plan import Job, is_complete
from distill_jax.jobs.stages import run_stages
from distill_jax.storage import files, folders
from distill_jax.storage.lease import Lease
from distill_jax.train import NonFiniteError

# They decide what a process does; folders may have another name on each host.
_SHARED_FLAGS = ("stages", "seeds", "dry_run", "compile_for", "profile_steps")


def run(argv: Sequence[str] | None = None) -> None:
  """Runs a command and exits, for the console script.

  The exit code is 2 for an error of the command, the config or its files, 1 for training that
  diverged, 75 where another process of the run was lost, 143 after SIGTERM and 130 after Ctrl-C.

  Args:
    argv: arguments of the command; None reads them from `sys.argv`.
  """
  try:
    with saying_why():
      main(sys.argv[1:] if argv is None else argv)
  except NonFiniteError as error:
    print(f"distill-jax: {error}", file=sys.stderr)
    hosts.abort(1)
  except Interrupted as stop:
    print(f"distill-jax: {stop}; the same command resumes", file=sys.stderr, flush=True)
    raise
  except (ValueError, OSError, ImportError, RuntimeError) as error:
    _end(error)


def _end(error: Exception) -> None:
  """Ends the command with a line and the code of an error; other RuntimeErrors are raised."""
  if jax.distributed.is_initialized() and is_lost_process(error):
    print(f"distill-jax: another process was lost: {error}", file=sys.stderr)
    hosts.abort(LOST_PROCESS_CODE)
  if files.is_disk_full(error):
    print(f"distill-jax: disk full: {error}; the same command resumes", file=sys.stderr)
    hosts.abort(2)
  if isinstance(error, RuntimeError):
    raise error
  print(f"distill-jax: {error}", file=sys.stderr)
  hosts.abort(2)


def main(argv: Sequence[str]) -> None:
  """Runs the stages of a config; the same command again resumes where it was interrupted.

  Args:
    argv: arguments of the command, see `python -m distill_jax --help`.

  Raises:
    ConfigError: the config or the data cannot be used as the command asks.
    SystemExit: a flag is unknown or its value cannot be read.
  """
  flags, overrides = parse_arguments(argv)
  _join(flags)
  path = config_file(flags.config)
  folder = folders.resolve_run(flags.workdir or f"runs/{path.stem}", "--workdir")
  equality.assert_equal("command", {name: str(vars(flags)[name]) for name in _SHARED_FLAGS})
  config = hosts.run_on_all(lambda: load_config(flags.config, overrides))
  if flags.compile_for:
    print(describe_cost(config, flags.compile_for))
    return
  if hosts.is_first() and not flags.dry_run:
    print(f"{path.stem}: {', '.join(flags.stages)} in {folder}", flush=True)
  splits = hosts.run_in_turn(config.data)
  run_identity = identity.identify(config, path, overrides, argv)
  config = hosts.run_on_all(lambda: with_steps(config, splits))
  teacher = _finished_teacher(flags.teacher)
  job = Job(config, folder, flags.seeds, splits, run_identity, flags.profile_steps, teacher)
  compared = {name: run_identity[name] for name in ("settings", "code", "versions")}
  equality.assert_equal("run", {**compared, "data": _data_digests(splits)})
  check(job, flags.stages)
  if hosts.is_first():
    _explain_seeds(flags.seeds)
    if teacher is not None:
      identity.explain_teacher(teacher, run_identity["settings"])
  if flags.dry_run:
    if hosts.is_first():
      print_plan(job)
    return
  _run(job, flags.stages)


def _data_digests(splits: Splits) -> dict[str, str]:
  """Returns the digests of a job's sets: one of other contents on one process changes all."""
  return {name: data.digest(examples) for name, examples in splits._asdict().items()}


def _finished_teacher(path: str | None) -> Path | None:
  """Returns the folder of a finished teacher, which may be given by its run's."""
  if path is None:
    return None
  folder = folders.resolve(path, "--teacher")
  for candidate in (folder, folder / "teacher"):
    if is_complete(candidate):
      return candidate
  raise ConfigError(
    f"--teacher: expected the folder of a run with a finished teacher, got {folder}: train it with "
    f"--stages=teacher --workdir={folder}"
  )


def _run(job: Job, stages: Sequence[str]) -> None:
  """Runs the stages in the run's folder, which no other process may use meanwhile."""
  report_only = tuple(stages) == ("report",)
  with Lease(job.folder):
    hosts.run_on_first(
      lambda: identity.write_run_file(
        job.folder, job.run, type(job.config), report_only=report_only
      )
    )
    enable_compilation_cache(job.folder)
    run_stages(job, stages)


def _explain_seeds(seeds: Sequence[int]) -> None:
  """Says what one number means: a seed, and not how many there are."""
  if len(seeds) == 1 and seeds[0] > 1:
    several = ",".join(map(str, range(seeds[0])))
    print(f"seeds: one, {seeds[0]}; for {seeds[0]} seeds: --seeds={several}", flush=True)


def _join(flags: argparse.Namespace) -> None:
  """Connects to the other processes of the run, if the command has any of the flags for them."""
  address = (flags.coordinator_address, flags.num_processes, flags.process_id)
  if flags.distributed or address != (None, None, None):
    try:
      hosts.join(*address)
    except ValueError as error:
      raise ConfigError(f"--distributed: {error}") from error
