"""Reads the command line: flags of a run, and overrides of its config's fields."""

import argparse
from collections.abc import Sequence

from distill_jax.errors import suggest
from distill_jax.jobs.near_names import nearest
from distill_jax.jobs.overrides import field_paths, load_config
from distill_jax.jobs.plan import EXTRA_STAGES, STAGES
from distill_jax.train.profile import parse_steps
from distill_jax.version import __version__


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags, and the overrides as texts `field=value`.

  An override is `--config.field=value` or `--config.field value`.
  """
  overrides = []
  others = []
  arguments = iter(argv)
  for argument in arguments:
    if not argument.startswith("--config."):
      others.append(_with_underscores(argument))
      continue
    override = argument.removeprefix("--config.")
    if "=" not in override:
      value = next(arguments, None)
      override = override if value is None else f"{override}={value}"
    overrides.append(override)
  parser = _parser()
  if "--help" in others or "-h" in others:
    _print_help(parser, others)
    parser.exit()
  flags, unknown = parser.parse_known_args(others)
  if unknown:
    parser.error(_unknown_flag(unknown[0], flags))
  return flags, overrides


def _with_underscores(argument: str) -> str:
  """Returns `--dry-run` as `--dry_run`; a value keeps its hyphens."""
  name, equals, value = argument.partition("=")
  return f"--{name[2:].replace('-', '_')}{equals}{value}" if name[:2] == "--" else argument


def _print_help(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
  """Prints the flags, and the fields of the config where the command has one."""
  config = argparse.ArgumentParser(add_help=False)
  config.add_argument("--config")
  path: str | None = config.parse_known_args(arguments)[0].config
  parser.print_help()
  if path is not None:
    print(f"\nfields of {path}, with their values (its classes document them):")
    for name, value in field_paths(load_config(path)).items():
      print(f"  --config.{name}={value}")


def _unknown_flag(argument: str, flags: argparse.Namespace) -> str:
  """Returns the message on a flag that does not exist: the flag or field that may be meant."""
  name, equals, value = argument.partition("=")
  if name[:2] != "--":
    return f"there is no {argument}; lists have commas, as in --seeds=0,1,2"
  fields = [f"config.{field}" for field in field_paths(load_config(flags.config))]
  near = nearest(name[2:], [*vars(flags), *fields])
  hint = " or ".join(f"--{other}{equals}{value}" for other in near)
  return f"there is no {argument}" + (f"; did you mean {hint}?" if hint else "; see --help")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "distill-jax",
    usage="%(prog)s --config=FILE [--config.FIELD=VALUE ...] [FLAG ...]",
    description="Trains a teacher, a baseline and a distilled student, and reports how they "
    "compare. The same command again resumes an interrupted run.",
    epilog="--config.FIELD=VALUE sets a field of the config, as in "
    "--config.student_training.steps=500. The classes of FILE document their fields. Exit codes: 0 "
    "complete; 1 diverged, or an error in code; 2 flags, config, data, folder or port cannot be "
    "used; 75 another process was lost, the same command resumes; 130 Ctrl-C; 143 SIGTERM.",
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
    "--config",
    required=True,
    metavar="FILE",
    help="Python file whose get_config() returns the job, or the name of one that distill_jax "
    "brings (digits)",
  )
  group.add_argument(
    "--workdir", metavar="FOLDER", help="folder of the run (default: runs/NAME_OF_FILE)"
  )
  group.add_argument(
    "--teacher",
    metavar="FOLDER",
    help="the finished teacher of another run, RUN or RUN/teacher, in place of a new one",
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
