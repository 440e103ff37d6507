"""Knowledge distillation in JAX.

Subpackages are imported when they are first used: `import distill_jax` imports nothing else,
`distill_jax.losses` imports jax, and everything that trains needs the `train` extra.
"""

import importlib
from typing import Any

from distill_jax.errors import naming_extras
from distill_jax.version import __version__

_SUBPACKAGES = (
  "boxes",
  "cache",
  "compression",
  "data",
  "distributed",
  "losses",
  "models",
  "objectives",
  "reduce",
  "report",
  "storage",
  "tasks",
  "teachers",
  "train",
)

_MODULES = {
  "describe_inputs": "distill_jax.storage.inputs",
  "export_student": "distill_jax.storage.student",
  "load_student": "distill_jax.storage.student",
}

__all__ = ["__version__", "describe_inputs", "export_student", "load_student"]


def __getattr__(name: str) -> Any:
  if name in _SUBPACKAGES:
    return importlib.import_module(f"distill_jax.{name}")
  if name in _MODULES:
    with naming_extras():
      return getattr(importlib.import_module(_MODULES[name]), name)
  raise AttributeError(f"module 'distill_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*__all__, *_SUBPACKAGES])
