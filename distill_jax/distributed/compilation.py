"""Compiled programs that outlive the process: a run that goes on does not compile again."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable_compilation_cache(folder: str | Path) -> str:
  """Turns on jax's persistent compilation cache, for what takes a second or more to compile.

  To be called before anything is compiled. Who may write there may run code here: jax trusts what it finds.

  Args:
    folder: of the run; programs are kept in its `compiled`. The environment's JAX_COMPILATION_CACHE_DIR comes first:
      a folder or a URL (`gs://`) that all hosts, and all runs, may share.

  Returns:
    Where they are kept.
  """
  place = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(folder) / "compiled")
  jax.config.update("jax_compilation_cache_dir", place)
  compilation_cache.reset_cache()  # jax asks once where it is
  return place
