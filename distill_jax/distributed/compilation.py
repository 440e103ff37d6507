"""Stores compiled programs on disk, so that a resumed run does not compile again."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable_compilation_cache(folder: str | Path) -> str:
  """Turns on jax's persistent cache, for programs that take a second or more to compile.

  Call it before anything is compiled. Any user who may write to the cache may run code here: jax
  trusts its content.

  Args:
    folder: folder of the run; programs are stored in its `compiled`. The environment variable
      JAX_COMPILATION_CACHE_DIR takes precedence: a folder or a URL (`gs://`) that all hosts, and
      all runs, may share.

  Returns:
    Where the programs are stored.
  """
  location = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(folder) / "compiled")
  jax.config.update("jax_compilation_cache_dir", location)
  # jax reads the location only once.
  compilation_cache.reset_cache()
  return location
