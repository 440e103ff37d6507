"""Runs the stages of a config: `python -m distill_jax --config=configs/digits.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_jax.distributed import hosts
from distill_jax.distributed.compilation import enable_compilation_cache
from distill_jax.distributed.interruption import Interrupted, saying_why
from distill_jax.errors import suggest
from distill_jax.jobs import identity
from distill_jax.jobs.checks import check
from distill_jax.jobs.compile_ahead import describe_cost
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.dry_run import print_plan
from distill_jax.jobs.overrides import load_config
from distill_jax.jobs.plan import EXTRA_STAGES, STAGES, Job
from distill_jax.jobs.stages import run_stages
from distill_jax.storage.lease import Lease
from distill_jax.train import NonFiniteError
from distill_jax.train.profile import parse_steps
from distill_jax.version import __version__


def run(argv: Sequence[str] | None = None) -> None:
  """Runs a command and exits: the console script.

  The exit code is 2 for an error of the command, the config or its files, 1 for training that
  diverged, 143 after SIGTERM and 130 after Ctrl-C.

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
    print(f"distill-jax: {stop}", file=sys.stderr, flush=True)
    raise
  except (ValueError, OSError, ImportError) as error:
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
  config = load_config(flags.config, overrides)
  if flags.compile_for:
    print(describe_cost(config, flags.compile_for))
    return
  path = Path(flags.config)
  folder = Path(flags.workdir or f"runs/{path.stem}").resolve()
  splits = hosts.run_in_turn(config.data)
  run_identity = identity.identify(config, path, overrides, argv)
  job = Job(config, folder, flags.seeds, splits, run_identity, flags.profile_steps)
  hosts.assert_equal("run", {name: run_identity[name] for name in ("settings", "code", "versions")})
  check(job, flags.stages)
  if flags.dry_run:
    if hosts.is_first():
      print_plan(job)
    return
  _run(job, flags.stages)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags, and the overrides as texts `field=value`.

  An override is `--config.field=value` or `--config.field value`.
  """
  overrides = []
  others = []
  arguments = iter(argv)
  for argument in arguments:
    if not argument.startswith("--config."):
      others.append(argument)
      continue
    override = argument.removeprefix("--config.")
    if "=" not in override:
      value = next(arguments, None)
      override = override if value is None else f"{override}={value}"
    overrides.append(override)
  return _parser().parse_args(others), overrides


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


def _join(flags: argparse.Namespace) -> None:
  """Connects to the other processes of the run, if the command has any of the flags for them."""
  address = (flags.coordinator_address, flags.num_processes, flags.process_id)
  if flags.distributed or address != (None, None, None):
    try:
      hosts.join(*address)
    except ValueError as error:
      raise ConfigError(f"--distributed: {error}") from error


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "distill-jax",
    usage="%(prog)s --config=FILE [--config.FIELD=VALUE ...] [FLAG ...]",
    description="Trains a teacher, a baseline and a distilled student, and reports how they "
    "compare. The same command again resumes an interrupted run.",
    epilog="--config.FIELD=VALUE sets a field of the config, as in "
    "--config.student_training.steps=500. The classes of FILE document their fields.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=__version__)
  _add_run_flags(parser)
  _add_inspection_flags(parser)
  _add_process_flags(parser)
  return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("run")
  group.add_argument(
    "--config", required=True, metavar="FILE", help="Python file whose get_config() returns the job"
  )
  group.add_argument(
    "--workdir", metavar="FOLDER", help="folder of the run (default: runs/NAME_OF_FILE)"
  )
  group.add_argument(
    "--stages",
    type=_parse_stages,
    default=",".join(STAGES),
    metavar="A,B",
    help=f"stages to run (default: %(default)s; on request: {','.join(EXTRA_STAGES)})",
  )
  group.add_argument(
    "--seeds",
    type=_parse_seeds,
    default="0",
    metavar="I,J",
    help="seeds, one student and one baseline each, such as 0,1,2 (default: %(default)s)",
  )


def _add_inspection_flags(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("inspection")
  group.add_argument(
    "--dry_run", action="store_true", help="print shapes, sizes and memory without training"
  )
  group.add_argument(
    "--compile_for",
    metavar="TOPOLOGY",
    help="print time and memory of a step on v5e:4x4, v5p:8x8x8, ... or cpu, without a TPU",
  )
  group.add_argument(
    "--profile_steps",
    type=_parse_profile_steps,
    metavar="START:STOP",
    help="steps of each training to trace into FOLDER/*/profile",
  )


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("several processes")
  group.add_argument(
    "--distributed",
    action="store_true",
    help="run the same command on each process; TPU pods, SLURM and Open MPI need no other flag",
  )
  group.add_argument(
    "--coordinator_address", metavar="HOST:PORT", help="address of process 0, elsewhere"
  )
  group.add_argument(
    "--num_processes", type=int, metavar="N", help="number of processes, elsewhere"
  )
  group.add_argument(
    "--process_id", type=int, metavar="I", help="index of this process from 0, elsewhere"
  )


def _parse_stages(text: str) -> tuple[str, ...]:
  stages = tuple(part.strip() for part in text.split(","))
  for stage in stages:
    if stage not in STAGES + EXTRA_STAGES:
      hint = suggest(stage, STAGES + EXTRA_STAGES)
      raise argparse.ArgumentTypeError(f"there is no stage {stage!r}{hint}")
  return stages


def _parse_seeds(text: str) -> tuple[int, ...]:
  try:
    seeds = tuple(int(part) for part in text.split(","))
  except ValueError:
    seeds = ()
  largest = 2**32 - 1
  if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > largest:
    raise argparse.ArgumentTypeError(
      f"expected different integers from 0 to {largest}, such as 0,1,2, got {text!r}"
    )
  return seeds


def _parse_profile_steps(text: str) -> range:
  try:
    return parse_steps(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error
