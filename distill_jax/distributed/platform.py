"""Returns the platform that a step is traced for, another than this process' if compiled ahead,
and what a CPU is compiled for.
"""

import contextlib
import contextvars
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax

_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


_VECTORS = {"avx512f": "AVX512", "avx2": "AVX2", "avx": "AVX"}


def target_platform() -> str:
  """Returns 'cpu', 'gpu' or 'tpu': the platform of `tracing_for`, else `jax.default_backend()`.

  Only functions that are traced again for each program may call it: a trace that jax caches keeps
  the answer for the other platform.
  """
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
  """Sets `target_platform` while a program is traced for a platform that need not be there."""
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def instruction_set() -> str:
  """Returns the widest vector instructions that XLA compiles for on this CPU; '' if unknown.

  Sums of another width are rounded otherwise: a training ends with other weights.
  """
  limit = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
  if limit:
    return limit[1].upper()
  cpu = Path("/proc/cpuinfo")
  features = set(cpu.read_text().split()) if cpu.exists() else set()
  return next((name for feature, name in _VECTORS.items() if feature in features), "")
