"""RUNNING_ON_TPU.md: the command line accepts each of its commands and overrides."""

import pathlib
import re
import shlex

import pytest

import distill_jax
from distill_jax.jobs.flags import parse_arguments
from distill_jax.jobs.overrides import load_config
from distill_jax.train.profile import parse_steps

TEXT = (pathlib.Path(distill_jax.__file__).parent / "docs" / "RUNNING_ON_TPU.md").read_text()
# From the program's name to the end of its flags.
COMMANDS = re.findall(
  r"(?:distill-jax|-m distill_jax) ((?:--\S+\s+)*--[^\s;`']+)",
  TEXT.replace("\\\n", " ").replace("...", ""),
)
OVERRIDES = re.findall(r"--config\.([\w.]+=[\w/-]+)", TEXT)


def test_commands_are_extracted_from_the_text():
  assert len(COMMANDS) >= 9 and len(OVERRIDES) >= 9
  assert all("--config=" in command or "--distributed" in command for command in COMMANDS)


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "--config=" in c}))
def test_command_has_existing_flags_and_fields(command):
  flags, overrides = parse_arguments(shlex.split(command))
  load_config(flags.config, overrides)


@pytest.mark.parametrize("override", sorted(set(OVERRIDES)))
def test_overridden_field_exists(override):
  load_config("configs/imagenet_patient.py", [override])


def test_profile_steps_can_be_parsed():
  ranges = [parse_steps(text) for text in re.findall(r"--profile_steps=([\d:]+)", TEXT)]
  assert ranges == [range(100, 110)]
