"""A resumed run finds the programs that another process compiled."""

import os
import subprocess
import sys
import warnings

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from distill_jax.distributed import compilation
from distill_jax.distributed.compilation import enable_compilation_cache

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


def compile_once(folder):
  """Returns (location, result, number of cache hits) of a process that compiles."""
  names = set(os.environ) - {"JAX_COMPILATION_CACHE_DIR"}
  child = subprocess.run(
    [sys.executable, "-W", "error", "-c", CODE, str(folder)],
    env={name: os.environ[name] for name in names},
    capture_output=True,
    text=True,
  )
  assert child.returncode == 0, child.stderr
  return child.stdout.split()


def test_second_process_finds_what_the_first_compiled(tmp_path):
  location, result, hits = compile_once(tmp_path)
  assert (location, hits) == (str(tmp_path / "compiled"), "0")
  assert list((tmp_path / "compiled").iterdir())
  again = compile_once(tmp_path)
  assert again[:2] == [location, result] and int(again[2]) > 0
  assert all(b"sha256" in f.read_bytes() for f in (tmp_path / "compiled").glob("*-cache"))


@pytest.fixture
def programs(tmp_path):
  found = compilation._checked_file_cache(str(tmp_path))
  assert found is not None
  return found[0]


def test_a_flip_in_a_program_is_found(tmp_path, programs):
  for position in range(0, 100, 7):
    programs.put("key", b"program" * 5)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 4
    file.write_bytes(content)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)
      assert programs.get("key") is None
    # The one that is compiled now takes its place.
    assert not file.exists()
  programs.put("key", b"program")
  file.write_bytes(b"x" + file.read_bytes()[1:])
  with pytest.warns(RuntimeWarning, match="key is corrupt"):
    programs.get("key")


@pytest.mark.parametrize("content", [b"", b"stored by another program" * 5])
def test_a_program_without_a_checksum_is_compiled_again(tmp_path, programs, content):
  programs.put("key", b"program")
  (file,) = tmp_path.iterdir()
  file.write_bytes(content)
  assert programs.get("key") is None
  programs.put("key", b"program")
  assert programs.get("key") == b"program"


def test_environment_takes_precedence(tmp_path, monkeypatch):
  old = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
  try:
    assert enable_compilation_cache(tmp_path / "run") == str(tmp_path / "shared")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")
  finally:
    jax.config.update("jax_compilation_cache_dir", old)
    compilation_cache.reset_cache()
