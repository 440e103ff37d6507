"""The compilation cache of a run: where it is, and that another process finds what was compiled."""

import os
import subprocess
import sys

CODE = """
import sys, jax, jax.numpy as jnp
from distill_jax.distributed.compilation import enable_compilation_cache
events = []
jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_compilation_cache_dir", sys.argv[1] + "-before")
jnp.ones(7).block_until_ready()
print(enable_compilation_cache(sys.argv[1]))
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((3, 3)))))
print(sum(name.endswith("compilation_cache/cache_hits") for name in events))
"""


def compiles(folder, **environment):
  """(where, result, hits) of a process that compiles."""
  own = {
    name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
  }  # the tests'
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", CODE, str(folder)],
    env=own | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
  place, result, hits = compiles(tmp_path)
  assert (place, hits) == (str(tmp_path / "compiled"), "0") and list(
    (tmp_path / "compiled").iterdir()
  )
  again = compiles(tmp_path)
  assert again[:2] == [place, result] and int(again[2]) > 0


def test_the_environment_comes_first(tmp_path):
  shared = tmp_path / "shared"
  assert compiles(tmp_path / "run", JAX_COMPILATION_CACHE_DIR=str(shared))[0] == str(shared)
  assert list(shared.iterdir()) and not (tmp_path / "run").exists()
