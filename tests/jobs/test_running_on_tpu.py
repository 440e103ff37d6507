"""RUNNING_ON_TPU.md: every command of ours that it gives is one that the command line takes."""

import pathlib
import re
import shlex

import pytest

import distill_jax
from distill_jax.jobs import cli
from distill_jax.jobs.overrides import load_config
from distill_jax.train.profile import parse_steps

TEXT = (pathlib.Path(distill_jax.__file__).parent / "docs" / "RUNNING_ON_TPU.md").read_text()
# From the name to where the shell goes on with something else.
COMMANDS = re.findall(
  r"(?:distill-jax|-m distill_jax) ((?:--\S+\s+)*--[^\s;`']+)",
  TEXT.replace("\\\n", " ").replace("...", ""),
)


def test_commands_were_found():
  assert len(COMMANDS) >= 9 and all("--config=" in c or "--distributed" in c for c in COMMANDS)


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "--config=" in c}))
def test_flags_files_and_fields_exist(command):
  flags, overrides = cli._parse(shlex.split(command))
  load_config(flags.config, overrides)


@pytest.mark.parametrize("override", sorted(set(re.findall(r"--config\.([\w.]+=[\w/-]+)", TEXT))))
def test_fields_exist(override):
  load_config("configs/imagenet_patient.py", [override])


def test_profile_steps_are_read():
  assert [parse_steps(t) for t in re.findall(r"--profile_steps=([\d:]+)", TEXT)] == [
    range(100, 110)
  ]
